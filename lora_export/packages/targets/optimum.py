"""Optimum's names and configuration: what its ORTModelFor… and ORT…Pipeline classes load."""

from typing import ClassVar

from lora_export.packages import companions
from lora_export.packages.job import RUNS_OWN, PackageFacts, PackageJob, PackageTarget, Snippet
from lora_export.packages.pipelines import laying, programs
from lora_export.packages.pipelines.families import family_of
from lora_export.packages.programs import python_program
from lora_export.packages.targets import hub_graphs

_SETUP = "pip install 'optimum-onnx==0.1.0' 'transformers<4.58' onnxruntime"
_DRAWING = "pip install 'optimum-onnx==0.1.0' 'transformers<4.58' 'diffusers<0.40' onnxruntime"


class OptimumTarget(PackageTarget):
    name: ClassVar[str] = "optimum"
    title: ClassVar[str] = "Optimum and ONNX Runtime"
    draws: ClassVar[bool] = True

    def lay(self, job: PackageJob) -> None:
        if job.run.task.draws:
            laying.lay_graphs(job.exports[RUNS_OWN], job.stage)
            return
        companions.lay(job.run, job.stage)
        hub_graphs.lay(job.exports[RUNS_OWN], job.stage)

    def snippet(self, facts: PackageFacts, folder: str) -> Snippet:
        if facts.task.draws:
            return programs.keeping(self.check(facts, folder))
        return python_program(facts, folder, "optimum.onnxruntime", facts.task.optimum, _SETUP)

    def check(self, facts: PackageFacts, folder: str) -> Snippet:
        if not facts.task.draws:
            return self.snippet(facts, folder)
        family = family_of(facts.class_name)  # a name from a list, as it becomes part of a program
        name, given, setup = f"ORT{facts.class_name}", list(family.arguments), _DRAWING
        if facts.providers[0] == "cuda":
            given, setup = ['provider="CUDAExecutionProvider"', *given], f"{_DRAWING}-gpu"
        return programs.picture_program(facts, folder, "optimum.onnxruntime", name, setup, given)

    def notes(self, facts: PackageFacts) -> str:
        return programs.notes(facts, checked=False) if facts.task.draws else ""


TARGET = OptimumTarget()
