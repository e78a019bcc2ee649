"""The merged folder as transformers, vLLM and TGI load it, or a pipeline as diffusers does, with a model card."""

from collections.abc import Sequence
from typing import ClassVar

from lora_export.errors import InputError
from lora_export.packages import companions, servers
from lora_export.packages.job import PackageFacts, PackageJob, PackageTarget, Run, Snippet, Variant
from lora_export.packages.pipelines import laying, programs
from lora_export.packages.pipelines.families import family_of
from lora_export.packages.programs import python_program
from lora_export.storage import sealed

CERTIFICATE = "lora_export_certificate.json"
# transformers 5.6 reads the names of text encoders that it and older versions wrote; older ones, its own alone.
_DRAWING = "pip install 'diffusers>=0.42' 'transformers>=5.6' torch"


class HubTarget(PackageTarget):
    name: ClassVar[str] = "hf"
    title: ClassVar[str] = "transformers, vLLM and TGI"
    needs_merged: ClassVar[bool] = True
    for_hub: ClassVar[bool] = True
    draws: ClassVar[bool] = True

    def variants(self, run: Run, names: Sequence[str]) -> tuple[Variant, ...]:
        if names:
            raise InputError(
                f"--variant {names[0]} with --for hf",
                expected="no variants: the weights are those of the merged folder",
                next_step="merge again with --dtype for another type",
            )
        return ()

    def lay(self, job: PackageJob) -> None:
        assert job.run.merged is not None
        if job.run.task.draws:
            laying.lay_merged(job.run, job.stage)
            return
        companions.lay(job.run, job.stage)
        for path in sorted(job.run.merged.iterdir()):
            if path.suffix == ".safetensors" or path.name in ("model.safetensors.index.json", CERTIFICATE):
                sealed.copy(path, job.stage / path.name)

    def snippet(self, facts: PackageFacts, folder: str) -> Snippet:
        if facts.task.draws:
            return programs.keeping(self.check(facts, folder))
        return python_program(facts, folder, "transformers", facts.task.auto, "pip install transformers torch")

    def check(self, facts: PackageFacts, folder: str) -> Snippet:
        if not facts.task.draws:
            return self.snippet(facts, folder)
        family = family_of(facts.class_name)  # a name from a list, as it becomes part of a program
        given = [f"variant={facts.weights!r}"] if facts.weights else []
        given += family.arguments
        given += ["safety_checker=None"] if laying.has_checker(facts.config) else []
        whole = ".to(torch.float32)"  # by a call whose name no version of diffusers has changed
        return programs.picture_program(facts, folder, "diffusers", facts.class_name, _DRAWING, given, whole)

    def notes(self, facts: PackageFacts) -> str:
        if facts.task.draws:
            return programs.notes(facts, checked=laying.has_checker(facts.config))
        return servers.notes(facts)


TARGET = HubTarget()
