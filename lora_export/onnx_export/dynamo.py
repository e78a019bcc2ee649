"""Every other model through torch.onnx.export(dynamo=True), fused for ONNX Runtime, with Optimum's names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from lora_export import files
from lora_export.contracts import Precision
from lora_export.errors import ExportError
from lora_export.onnx_export import companions, isolated
from lora_export.onnx_export.job import Job, Made, architecture_of

_HEADS = {
    "Model": "feature-extraction",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
}
_TEXT = (
    "Albert", "Bert", "Camembert", "Deberta", "DebertaV2", "DistilBert", "Electra", "MPNet", "ModernBert", "Roberta",
    "XLMRoberta",
)  # fmt: skip
_SPEECH = {"Model": "feature-extraction", "ForCTC": "automatic-speech-recognition",
           "ForSequenceClassification": "audio-classification"}  # fmt: skip
# Architecture → Optimum's name of the task.
TASKS: Mapping[str, str] = {
    **{f + h: task for f in _TEXT for h, task in _HEADS.items()},
    **{f + h: task for f in ("Wav2Vec2", "Hubert") for h, task in _SPEECH.items()},
    **{f + "Model": "feature-extraction" for f in ("ViT", "DeiT", "Dinov2")},
    **{f + "ForImageClassification": "image-classification" for f in ("ViT", "DeiT", "Dinov2")},
    "CLIPModel": "zero-shot-image-classification",
    "CLIPTextModel": "feature-extraction",
    "CLIPVisionModel": "feature-extraction",
    "CLIPTextModelWithProjection": "feature-extraction",
    "CLIPVisionModelWithProjection": "feature-extraction",
    "T5EncoderModel": "feature-extraction",
    **{f: "text2text-generation" for f in (
        "BartForConditionalGeneration", "MBartForConditionalGeneration", "MT5ForConditionalGeneration",
        "MarianMTModel", "PegasusForConditionalGeneration", "T5ForConditionalGeneration",
    )},
    **{f: "text-generation" for f in ("GPT2LMHeadModel", "GPTNeoXForCausalLM", "OPTForCausalLM")},
}  # fmt: skip
_PRECISIONS = ("fp32", "fp16", "bf16")
_RESULT = "made.json"


class DynamoEngine:
    name: ClassVar[str] = "dynamo"
    architectures: ClassVar[frozenset[str]] = frozenset(TASKS)

    def check(self, job: Job) -> None:
        self.check_precision(job.precision, job.provider)
        if job.adapter is not None:
            raise ExportError(
                "this engine's adapter cannot stay unmerged in the graph",
                where=job.adapter,
                next_step="benchmark base against merged without an unmerged graph",
            )

    def check_precision(self, precision: Precision, provider: str) -> None:
        if precision not in _PRECISIONS:
            raise ExportError(
                f"the dynamo engine does not export {precision}",
                expected=" or ".join(_PRECISIONS),
                next_step="--precision fp16",
            )

    def run(self, job: Job) -> Made:
        request = {
            "model": str(job.model.resolve()),
            "output": str(job.output.resolve()),
            "precision": job.precision,
            "optimize": job.optimize,
            "task": TASKS[architecture_of(job.config)],
            "result": _RESULT,
        }
        isolated.run("lora_export.onnx_export.dynamo_process", request, engine=self.name)
        path = Path(job.output, _RESULT)
        made: dict[str, Any] = files.read_json(path)
        path.unlink()
        return Made(made["kind"], made["task"], tuple(made["graphs"]), True)

    def accompany(self, model: Path, output: Path) -> None:
        companions.copy(model, output)
