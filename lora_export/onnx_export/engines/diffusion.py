"""The models of a pipeline of diffusers through torch.onnx.export(dynamo=True), with Optimum's names.

A model's place in its pipeline is in the configuration that the engine gets, under `PART`: an autoencoder has two
graphs, and the text encoder of a pipeline other outputs than one that stands alone.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from lora_export.choices import Precision
from lora_export.errors import ExportError
from lora_export.onnx_export.diffusion.components import CLASSES, PART, part_of
from lora_export.onnx_export.engines.protocol import Engine, ExportJob, Made, architecture_of
from lora_export.onnx_export.engines.requested import requested
from lora_export.onnx_export.quantize.settings import AUTO, GPTQ
from lora_export.storage import sealed


class DiffusionEngine(Engine):
    name: ClassVar[str] = "diffusion"
    optimizes: ClassVar[bool] = True

    def exports(self, config: Mapping[str, Any]) -> bool:
        """Models of pipelines, and denoisers that stand alone."""
        return (PART in config or "_class_name" in config) and architecture_of(config) in CLASSES

    def check(self, job: ExportJob) -> None:
        self.check_precision(job.precision, job.provider)
        if job.adapter is not None:
            raise ExportError(
                "this engine cannot keep an adapter unmerged in the graph",
                where=job.adapter,
                expected="a merged pipeline",
                next_step="lora-export merge -b PIPELINE -a ADAPTER -o OUT, then export OUT",
            )
        if job.quantized is not None and (job.quantized.algorithm == GPTQ or AUTO in job.quantized.keep):
            raise ExportError(
                "gptq and --keep auto read texts, and the models of a pipeline do not read texts alone",
                expected="--quantizer default, rtn or k_quant",
                next_step="the same command without --quantizer gptq and --keep auto",
            )

    def check_precision(self, precision: Precision, provider: str) -> None:
        if precision == "bf16":
            raise ExportError(
                "bf16 graphs of pipelines are not exported: ONNX Runtime has no bfloat16 convolution",
                expected="fp32, fp16, int8, int4 or nf4",
                next_step="--precision fp16",
            )

    def generates(self, config: Mapping[str, Any]) -> bool:
        return False

    def run(self, job: ExportJob) -> Made:
        return requested(
            job,
            self.name,
            "lora_export.onnx_export.engines.diffusion_process",
            provider=job.provider,
            library="diffusers" if "_class_name" in job.config else "transformers",
            part=part_of(job.config),
        )

    def accompany(self, model: Path, output: Path) -> None:
        """config.json alone: a pipeline's other files lie beside its models."""
        sealed.copy(model / "config.json", output / "config.json")


ENGINE = DiffusionEngine()
