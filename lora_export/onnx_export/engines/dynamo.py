"""Every other model through torch.onnx.export(dynamo=True), fused for ONNX Runtime, with Optimum's names."""

from collections.abc import Mapping
from typing import Any, ClassVar

from lora_export.choices import Precision
from lora_export.errors import ExportError
from lora_export.onnx_export.engines.export_tasks import task_of
from lora_export.onnx_export.engines.protocol import Engine, ExportJob, Made, architecture_of
from lora_export.onnx_export.engines.requested import requested


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
        module, task = "lora_export.onnx_export.engines.dynamo_process", task_of(architecture_of(job.config))
        return requested(job, self.name, module, task=task)


ENGINE = DynamoEngine()
