"""Every other model through torch.onnx.export(dynamo=True), fused for ONNX Runtime, with Optimum's names."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from lora_export.choices import Precision
from lora_export.errors import ExportError
from lora_export.onnx_export.engines.export_tasks import task_of
from lora_export.onnx_export.engines.protocol import Engine, ExportJob, Made, architecture_of
from lora_export.storage import sealed

_RESULT = "made.json"


class DynamoEngine(Engine):
    name: ClassVar[str] = "dynamo"
    optimizes: ClassVar[bool] = True

    def exports(self, config: Mapping[str, Any]) -> bool:
        """Whether transformers knows a task for the class."""
        return task_of(architecture_of(config)) is not None

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
        return bool(config.get("is_encoder_decoder")) or str(task_of(architecture_of(config))).endswith(
            "-generation"
        )

    def mixes_bits(self, config: Mapping[str, Any]) -> bool:
        return True

    def run(self, job: ExportJob) -> Made:
        request = {
            "model": str(job.model.resolve()),
            "output": str(job.output.resolve()),
            "precision": job.precision,
            "optimize": job.optimize,
            "quantized": asdict(job.quantized) if job.quantized else None,
            "architecture": architecture_of(job.config),
            "task": task_of(architecture_of(job.config)),
            "result": _RESULT,
        }
        job.worker.run("lora_export.onnx_export.engines.dynamo_process", request, engine=self.name)
        path = Path(job.output, _RESULT)
        made: dict[str, Any] = sealed.read_json(path)
        path.unlink()
        return Made(made["kind"], made["task"], tuple(made["graphs"]), True)


ENGINE = DynamoEngine()
