"""A planned pipeline written: merged components, and everything else byte for byte, all or nothing."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lora_export.checkpoint.companions import SKIPPED_SUFFIXES, WEIGHT_SUFFIXES
from lora_export.checkpoint.weight_files import named
from lora_export.contracts import AdapterChoice, ComponentMerge, MergeOptions, MergeResult, Progress, TensorRecord
from lora_export.errors import InputError
from lora_export.merging import merge_planned, peak_rss
from lora_export.merging.certificate.document import NAME
from lora_export.merging.pipelines.document import write_pipeline_certificate
from lora_export.merging.pipelines.planning import PipelinePlan, plan_pipeline
from lora_export.merging.pipelines.right_base import pipeline_checks
from lora_export.storage.disk import check_space
from lora_export.storage.files import output_folder
from lora_export.storage.sealed import copy, refuse_outward_link

Accept = Callable[[str, Sequence[TensorRecord]], None]
_MOST = 6  # names in a warning


def merge_pipeline(
    base: Path, adapters: Sequence[AdapterChoice], output: Path, options: MergeOptions, progress: Progress
) -> MergeResult:
    """Merge adapters into the components that they change, and copy the others byte for byte, all or nothing."""
    planned = plan_pipeline(base, adapters, options)
    return merge_planned_pipeline(planned, output, progress, force=options.force)


def merge_planned_pipeline(
    planned: PipelinePlan,
    output: Path,
    progress: Progress,
    *,
    force: bool,
    accept: Accept | None = None,
) -> MergeResult:
    """Write the folder of a plan, as `merge_pipeline` says.

    accept: is shown what was made of each component's tensors before the output is replaced; it may raise to keep
    what is there.
    """
    pipeline, started = planned.pipeline, time.monotonic()
    if not planned.components:
        raise InputError(
            "no adapter is given: there is nothing to merge", where=pipeline.folder, next_step="-a ADAPTER"
        )
    for text in planned.warnings:
        progress.warn(text)
    if pipeline.class_name is None:  # a model alone: its folder is the output
        return _alone(planned, output, progress, force, accept)
    inputs = [pipeline.folder, *(c.folder for c in planned.choices)]
    files, left = to_copy(planned)
    results: dict[str, MergeResult] = {}
    with output_folder(output, force, inputs=inputs) as stage:
        check_space(stage, planned.nbytes)
        for path in files:
            target = stage / path.relative_to(pipeline.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            copy(path, target, pipeline.folder)
        for name, raw in planned.tokens.files(planned.components).items():
            (stage / name).write_bytes(raw)
        for name, plan in planned.components.items():
            progress.stage(f"{name} ({pipeline.components[name].class_name})")
            results[name] = merge_planned(plan, stage / name, progress, force=False)
        write_pipeline_certificate(stage, planned)
        if accept is not None:
            for name, result in results.items():
                accept(name, result.records)
    checks = pipeline_checks(planned)
    noticed = [f"is this the right base? {c.note}" for c in checks if c.outcome == "differs"]
    if left:
        more = f" and {len(left) - _MOST} more" if len(left) > _MOST else ""
        noticed.append(f"not copied, as no component of the pipeline: {', '.join(left[:_MOST])}{more}")
    for text in noticed:
        progress.warn(text)
    whole = _joined(results, output, time.monotonic() - started)
    whole = replace(
        whole, warnings=(*planned.warnings, *noticed, *whole.warnings), base_checks=(*checks, *whole.base_checks)
    )
    return _with_components(whole, planned, results)


def _alone(
    planned: PipelinePlan,
    output: Path,
    progress: Progress,
    force: bool,
    accept: Accept | None,
) -> MergeResult:
    ((name, plan),) = planned.components.items()
    shown = None if accept is None else lambda stage, records: accept(name, records)
    result = merge_planned(plan, output, progress, force=force, accept=shown)
    return _with_components(result, planned, {})


def to_copy(planned: PipelinePlan) -> tuple[list[Path], list[str]]:
    """(files of the pipeline that a merge copies, what it leaves out): no code, no pickles, no other variants."""
    pipeline, root = planned.pipeline, planned.pipeline.folder
    parts = {*pipeline.components, *pipeline.others}
    files, left = [], []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        part = name.parts[0]
        if path.is_dir() or part in planned.components or any(p.startswith(".") for p in name.parts):
            continue
        inside = len(name.parts) > 1
        foreign = (inside and part not in parts) or path.suffix in SKIPPED_SUFFIXES - {".safetensors"}
        if foreign or (path.suffix in WEIGHT_SUFFIXES and not (inside and _is_chosen(path, planned, part))):
            left.append(name.as_posix())
        elif path.name != NAME:  # it would be of an earlier merge
            refuse_outward_link(path, root)
            files.append(path)
    return files, left


def _is_chosen(path: Path, planned: PipelinePlan, part: str) -> bool:
    """Whether weights are those that the pipeline is read with; of other parts, such as a safety checker, all."""
    checkpoint = planned.checkpoints.get(part)
    return checkpoint is None or named(path.name) == checkpoint.files


def _joined(results: Mapping[str, MergeResult], output: Path, seconds: float) -> MergeResult:
    """Sums over components, as if they had been one model."""
    tensors: Counter[str] = Counter()
    adapter: Counter[str] = Counter()
    for result in results.values():
        tensors.update(result.tensors)
        adapter.update(result.adapter_tensors)
    largest = max(results.values(), key=lambda r: sum(r.tensors.values()))
    survivals = [r.delta_survival for r in results.values() if r.delta_survival is not None]
    return replace(
        largest,
        output=output,
        tensors=dict(tensors),
        adapter_tensors=dict(adapter),
        seconds=seconds,
        peak_rss_bytes=peak_rss(),
        delta_survival=min(survivals, default=None),
        certificate=output / NAME,
        records=tuple(replace(r, name=f"{n}: {r.name}") for n, res in results.items() for r in res.records),
        warnings=tuple(f"{n}: {w}" for n, r in results.items() for w in r.warnings),
        base_checks=tuple(replace(c, name=f"{n}: {c.name}") for n, r in results.items() for c in r.base_checks),
        interference=tuple(i for r in results.values() for i in r.interference),
    )


def _with_components(result: MergeResult, planned: PipelinePlan, results: Mapping[str, MergeResult]) -> MergeResult:
    components = {}
    for name, plan in planned.components.items():
        own = results.get(name, result)
        kinds = Counter(u.kind for t in plan.tensors.values() for u in t.updates)
        components[name] = ComponentMerge(own.tensors, own.delta_survival, own.dtype, dict(sorted(kinds.items())))
    return replace(result, components=components)
