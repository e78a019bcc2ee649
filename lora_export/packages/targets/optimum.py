"""Optimum's names and configuration: what its ORTModelFor… classes load."""

from typing import ClassVar

from lora_export.packages import companions
from lora_export.packages.job import RUNS_OWN, PackageFacts, PackageJob, PackageTarget, Snippet
from lora_export.packages.programs import python_program
from lora_export.packages.targets import hub_graphs

_SETUP = "pip install 'optimum-onnx==0.1.0' 'transformers<4.58' onnxruntime"


class OptimumTarget(PackageTarget):
    name: ClassVar[str] = "optimum"
    title: ClassVar[str] = "Optimum and ONNX Runtime"

    def lay(self, job: PackageJob) -> None:
        companions.lay(job.run, job.stage)
        hub_graphs.lay(job.exports[RUNS_OWN], job.stage)

    def snippet(self, facts: PackageFacts, folder: str) -> Snippet:
        return python_program(facts, folder, "optimum.onnxruntime", facts.task.optimum, _SETUP)


TARGET = OptimumTarget()
