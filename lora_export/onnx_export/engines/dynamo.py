"""Every other model through torch.onnx.export(dynamo=True), fused for ONNX Runtime, with Optimum's names."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from lora_export.choices import Precision
from lora_export.errors import ExportError
from lora_export.onnx_export.engines import isolated
from lora_export.onnx_export.engines.protocol import Engine, ExportJob, Made, architecture_of
from lora_export.storage import sealed

_HEADS = {
    "Model": "feature-extraction",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
}
_TEXT = (
    "Albert", "Bert", "Camembert", "Deberta", "DebertaV2", "DistilBert", "Electra", "MPNet", "ModernBert",
    "Roberta", "XLMRoberta",
)  # fmt: skip
# Decoders with a head on the last token or on every token: rerankers, reward models, taggers.
_JUDGES = ("Gemma", "GPT2", "Llama", "Mistral", "Phi3", "Qwen2", "Qwen3")
_SPEECH = {
    "Model": "feature-extraction",
    "ForCTC": "automatic-speech-recognition",
    "ForSequenceClassification": "audio-classification",
}
_PAIRED = ("CLIPTextModel", "CLIPVisionModel", "CLIPTextModelWithProjection", "CLIPVisionModelWithProjection")
_SEQ2SEQ = (
    "BartForConditionalGeneration", "MBartForConditionalGeneration", "MT5ForConditionalGeneration",
    "MarianMTModel", "PegasusForConditionalGeneration", "T5ForConditionalGeneration",
)  # fmt: skip
_VISION = {"Model": "feature-extraction", "ForImageClassification": "image-classification"}
# Architecture → Optimum's name for the task.
TASKS: Mapping[str, str] = {
    **{family + head: task for family in _TEXT for head, task in _HEADS.items()},
    **{
        family + head: _HEADS[head]
        for family in _JUDGES
        for head in ("ForSequenceClassification", "ForTokenClassification")
    },
    **{family + head: task for family in ("Wav2Vec2", "Hubert") for head, task in _SPEECH.items()},
    **{family + head: task for family in ("ViT", "DeiT", "Dinov2") for head, task in _VISION.items()},
    "CLIPModel": "zero-shot-image-classification",
    "T5EncoderModel": "feature-extraction",
    **dict.fromkeys(_PAIRED, "feature-extraction"),
    **dict.fromkeys(_SEQ2SEQ, "text2text-generation"),
    **dict.fromkeys(("GPT2LMHeadModel", "GPTNeoXForCausalLM", "OPTForCausalLM"), "text-generation"),
}
_RESULT = "made.json"


class DynamoEngine(Engine):
    name: ClassVar[str] = "dynamo"
    architectures: ClassVar[frozenset[str]] = frozenset(TASKS)
    optimizes: ClassVar[bool] = True

    def check(self, job: ExportJob) -> None:
        self.check_precision(job.precision, job.provider)
        if job.adapter is not None:
            raise ExportError(
                "this engine cannot keep an adapter unmerged in the graph",
                where=job.adapter,
                next_step="benchmark base against merged without an unmerged graph",
            )

    def check_precision(self, precision: Precision, provider: str) -> None:
        if precision == "bf16" and provider == "cpu":
            raise ExportError(
                "bf16 does not run on the CPU: ONNX Runtime has no bfloat16 MatMul there",
                expected="fp32, fp16, int8, int4 or nf4",
                next_step="--precision fp32, or --provider cuda",
            )

    def generates(self, config: Mapping[str, Any]) -> bool:
        return TASKS[architecture_of(config)].endswith("-generation")

    def run(self, job: ExportJob) -> Made:
        request = {
            "model": str(job.model.resolve()),
            "output": str(job.output.resolve()),
            "precision": job.precision,
            "optimize": job.optimize,
            "quantized": asdict(job.quantized) if job.quantized else None,
            "task": TASKS[architecture_of(job.config)],
            "result": _RESULT,
        }
        isolated.run("lora_export.onnx_export.engines.dynamo_process", request, engine=self.name)
        path = Path(job.output, _RESULT)
        made: dict[str, Any] = sealed.read_json(path)
        path.unlink()
        return Made(made["kind"], made["task"], tuple(made["graphs"]), True)


ENGINE = DynamoEngine()
