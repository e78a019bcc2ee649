"""Encoders through torch.onnx.export(dynamo=True) and onnxscript's fusions for ONNX Runtime."""

from pathlib import Path
from typing import ClassVar

from lora_export.contracts import Precision
from lora_export.errors import ExportError
from lora_export.onnx_export import companions, isolated
from lora_export.onnx_export.job import Job, Made

_FAMILIES = ("Bert", "Roberta", "XLMRoberta", "Camembert", "DistilBert", "MPNet", "Electra")
_HEADS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")
_PRECISIONS = ("fp32", "fp16")


class DynamoEngine:
    name: ClassVar[str] = "dynamo"
    architectures: ClassVar[frozenset[str]] = frozenset(f + h for f in _FAMILIES for h in _HEADS)

    def check(self, job: Job) -> None:
        self.check_precision(job.precision, job.provider)
        if job.adapter is not None:
            raise ExportError(
                "an encoder's adapter cannot stay unmerged in the graph",
                where=job.adapter,
                next_step="benchmark base against merged without an unmerged graph",
            )

    def check_precision(self, precision: Precision, provider: str) -> None:
        if precision not in _PRECISIONS:
            raise ExportError(
                f"an encoder cannot be exported as {precision}",
                expected=" or ".join(_PRECISIONS),
                next_step="--precision fp16",
            )

    def run(self, job: Job) -> Made:
        request = {
            "model": str(job.model.resolve()),
            "output": str(Path(job.output.resolve(), "model.onnx")),
            "precision": job.precision,
        }
        isolated.run("lora_export.onnx_export.dynamo_process", request, engine=self.name)
        return Made("encoder", "feature-extraction", ("model.onnx",), False)

    def accompany(self, model: Path, output: Path) -> None:
        companions.copy(model, output)
