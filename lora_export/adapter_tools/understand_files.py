"""What an adapter of an image model has learnt: figures of a file alone, or of its change of a pipeline."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from lora_export.adapter_tools.files import LoraFile, open_lora
from lora_export.adapter_tools.spectrum import figures_of, spectrum_of, with_base
from lora_export.adapter_tools.understand import understood
from lora_export.adapters import CONFIG
from lora_export.adapters.kind import AdapterFile, float64
from lora_export.checkpoint import open_adapter_files
from lora_export.checkpoint.adapter_files import open_single_file, single_file
from lora_export.checkpoint.pipeline import is_pipeline
from lora_export.contracts import AdapterChoice, MergeOptions, ModuleFigures, Progress, Understanding
from lora_export.errors import InputError
from lora_export.merging.pipelines.planning import PipelinePlan, plan_pipeline
from lora_export.progress import Silent


def understand_of_images(
    adapter: Path, base: Path | None = None, progress: Progress | None = None
) -> Understanding:
    """As `understand`, of a single file, or of a PEFT folder whose base is a pipeline.

    With a base of all kinds, by the base's names; without one of plain LoRA, by the file's own spellings.
    """
    progress = progress or Silent()
    path = single_file(adapter)
    if base is None:
        assert path is not None
        read = open_lora(path, allow_nonfinite=True)
        file, skipped = read.file, dict[str, str]()
        source, count = _alone(read, skipped), len(read.seen.modules)
    elif not is_pipeline(base):
        raise InputError(
            "this is an adapter of an image model, and the base is none",
            where=base,
            expected="a folder with model_index.json, or a model of diffusers",
        )
    else:
        planned = plan_pipeline(base, [AdapterChoice(adapter)], MergeOptions(allow_nonfinite=True))
        file, skipped = _file(adapter, path), {}
        source, count = _with_base(planned, file), sum(p.counts["updated"] for p in planned.components.values())
    modules = []
    for module in source:
        modules.append(module)
        progress.advance(len(modules), count)
    if not modules:
        raise InputError(
            "no module of this adapter is plain LoRA, whose figures need no base",
            where=adapter,
            expected="the pipeline beside it",
            next_step=f"lora-export inspect -a {adapter} -b PIPELINE",
        )
    return understood(adapter, modules, skipped, file.config, file)


def _file(adapter: Path, path: Path | None) -> AdapterFile:
    if path is not None:
        return AdapterFile(open_single_file(path)[0], {}, path)
    config, tensors = open_adapter_files(adapter)
    return AdapterFile(tensors, config, adapter / CONFIG)


def _alone(read: LoraFile, skipped: dict[str, str]) -> Iterator[ModuleFigures]:
    for module in read.seen.modules:
        if not read.is_plain(module):
            skipped[module.spelling] = f"{module.kind}: give -b PIPELINE"
            continue
        with float64():
            low = read.factors(module)
        figures = figures_of(read.update(module, beside=True), read.file, spectrum_of(low), low, None, "")
        yield replace(figures, alpha=module.alpha, type=module.target)


def _with_base(planned: PipelinePlan, file: AdapterFile) -> Iterator[ModuleFigures]:
    """Of each component, with its name before those of its weights."""
    modules = planned.adapters[0].modules
    alphas = {f"{m.component}.{piece.module}": m.alpha for m in modules for piece in m.pieces}
    for component, plan in planned.components.items():
        for figures in with_base(plan, file):
            name = f"{component}.{figures.name}"
            yield replace(figures, name=name, alpha=alphas.get(name.rpartition(".")[0], figures.alpha))
