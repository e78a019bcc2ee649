"""Merging: the one place where base, adapters and quantization meet."""

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from lora_export.adapters import CONFIG as ADAPTER_CONFIG
from lora_export.adapters import AdapterFile, read_adapter
from lora_export.checkpoint import Checkpoint, TensorFiles, open_adapter_files, open_checkpoint
from lora_export.checkpoint.companions import companion_files
from lora_export.contracts import (
    AdapterChoice,
    BaseCheck,
    Interference,
    MergeOptions,
    MergeResult,
    Progress,
    TensorRecord,
)
from lora_export.errors import RuntimeUnavailable
from lora_export.merging.architecture.model import loaded_weights, token_modules
from lora_export.merging.certificate.document import NAME as CERTIFICATE
from lora_export.merging.certificate.document import certificate_of, write_certificate
from lora_export.merging.planning.base import base_weights
from lora_export.merging.planning.base_checks import base_checks
from lora_export.merging.planning.combine import check_options
from lora_export.merging.planning.plan import MergePlan, plan_merge, without_updates
from lora_export.merging.running.audit import Auditor
from lora_export.merging.running.companions import write_beside
from lora_export.merging.running.interference import OPPOSED, interference
from lora_export.merging.running.layout import write_shards
from lora_export.merging.running.read_base import ReadBase
from lora_export.merging.running.stream import MergedSource, write_outline
from lora_export.meta_model import parameter_names
from lora_export.progress import Silent
from lora_export.storage.disk import check_space
from lora_export.storage.files import output_folder
from lora_export.storage.memory import importing
from lora_export.storage.sealed import write_sealed
from lora_export.storage.workers import Job

__all__ = [
    "CERTIFICATE",
    "MergePlan",
    "MergedSource",
    "begin_stream",
    "end_stream",
    "headed_base",
    "interference",
    "merge",
    "merge_planned",
    "peak_rss",
    "plan",
    "prepare",
    "written_source",
]


def plan(base: Path | Checkpoint, adapters: Sequence[AdapterChoice], options: MergeOptions) -> MergePlan:
    """Read headers and configurations, and decide everything. No adapters: only dequantizing and copying.

    base: a folder, or one whose tensors come from another source than its files.
    """
    check_options(options)
    checkpoint = open_checkpoint(base, options.variant) if isinstance(base, Path) else base
    weights = base_weights(checkpoint, options, None) if adapters else {}
    shapes, model = {n: w.shape for n, w in weights.items()}, ReadBase(checkpoint, weights, options)
    read = []
    for choice in adapters:
        config, tensors = open_adapter_files(choice.folder)
        if config.get("save_projection") is False:  # VeRA draws by the shapes of the layers that it names
            loaded = loaded_weights(checkpoint, shapes)
            shapes |= {n: p[0].loaded or shapes[p[0].name] for n, p in loaded.items() if len(p) == 1}
        file = AdapterFile(
            tensors,
            config,
            choice.folder / ADAPTER_CONFIG,
            choice.weight if options.combine == "none" else 1.0,
            options.expert_packing,
            options.expert_layout,
            checkpoint.model_types,
            shapes,
            options.allow_nonfinite,
            base=model,
            token_modules=partial(token_modules, checkpoint),
            defined=cache(partial(parameter_names, checkpoint.folder, checkpoint.config)),
        )
        read.append(replace(read_adapter(file), weight=choice.weight))
    return plan_merge(checkpoint, read, options)


def merge(
    base: Path | Checkpoint,
    adapters: Sequence[AdapterChoice],
    output: Path,
    options: MergeOptions | None = None,
    progress: Progress | None = None,
    *,
    certified: bool = True,
) -> MergeResult:
    """Merge adapter folders into a base folder and write a Hugging Face folder, all or nothing.

    Arithmetic is fp32, or float64 where fp32 is written and for image models, and rounded once. Raises
    LoraExportError before the first byte for whatever headers can tell, and leaves nothing behind if something
    fails later. certified=False leaves out hashes and the comparison with float64, to see what they cost; such a
    folder cannot be verified.
    """
    options = options or MergeOptions()
    planned = plan(base, adapters, options)
    return merge_planned(planned, output, progress or Silent(), force=options.force, certified=certified)


def merge_planned(
    planned: MergePlan,
    output: Path,
    progress: Progress,
    *,
    force: bool,
    certified: bool = True,
    accept: Callable[[Path, Sequence[TensorRecord]], None] | None = None,
) -> MergeResult:
    """Write the folder of a plan, as `merge` says.

    accept: is shown the finished folder, and what was made of each tensor, before the output is replaced; it may
    raise to keep what is there.
    """
    if planned.computes:
        prepare(planned.options.device)
    started, base = time.monotonic(), planned.base.folder
    progress.stage(f"merge: {planned.counts['updated']} weights updated, {planned.counts['copied']} copied")
    if planned.model:
        progress.stage(f"output: {planned.model.words}")
    between = _interference(planned, progress)
    inputs, companions = [base, *(a.folder for a in planned.adapters)], companion_files(base)
    with output_folder(output, force, inputs=inputs) as stage:
        check_space(stage, planned.nbytes)
        audit = Auditor(planned, certified)
        write_shards(planned, stage, progress, audit, also=[Job(audit.hash_adapters)])
        warnings = [*planned.warnings, *write_beside(planned, companions, stage)]
        if accept is not None:
            accept(stage, audit.records)
        checks = base_checks(planned)
        write_certificate(stage, audit, checks)
    return _result(audit, checks, warnings, output / CERTIFICATE, time.monotonic() - started, between, progress)


def written_source(result: MergeResult) -> TensorFiles:
    """The tensors of a folder that was merged just now, with the hashes that its certificate has of them."""
    hashes = {r.name: r.hash_out for r in result.records if r.hash_out is not None}
    return TensorFiles(open_checkpoint(result.output).tensors, hashes)


def headed_base(
    base: Path, adapters: Sequence[AdapterChoice], output: Path, options: MergeOptions, progress: Progress
) -> bool:
    """Write the base as a model of the merged one's class, with the adapters' heads and nothing else of theirs.

    Such a base is what a merged classifier is compared with. False, and nothing is written, where the base is of
    that class already.
    """
    planned = plan(base, adapters, replace(options, dtype="keep", combine="none")) if adapters else None
    if planned is None or planned.model is None:
        return False
    planned = without_updates(planned)
    prepare(options.device)
    with output_folder(output, True, inputs=[base, *(a.folder for a in adapters)]) as stage:
        write_shards(planned, stage, progress, Auditor(planned, certified=False))
        write_beside(planned, companion_files(base), stage)
    return True


def _interference(planned: MergePlan, progress: Progress) -> tuple[Interference, ...]:
    """What several adapters do to each other, reported before anything is written."""
    pairs = tuple(interference(planned)) if len(planned.adapters) > 1 else ()
    for pair in pairs:
        if pair.tensor is None:
            progress.stage(f"{pair.first} and {pair.second}: the cosine of their changes is {pair.cosine:+.2f}")
            if not pair.cosine >= OPPOSED:
                progress.warn(f"{pair.first} and {pair.second} undo part of each other: their cosine is negative")
    return pairs


def _result(
    audit: Auditor,
    checks: Sequence[BaseCheck],
    warnings: Sequence[str],
    certificate: Path,
    seconds: float,
    between: tuple[Interference, ...],
    progress: Progress,
) -> MergeResult:
    """What was merged; its warnings, and those that follow from the audit and the checks, go to `progress`."""
    planned = audit.plan
    wrong = [f"is this the right base? {c.note}" for c in checks if c.outcome == "differs"]
    warnings = [*warnings, *_judge(planned, audit.survival), *wrong]
    for text in warnings:
        progress.warn(text)
    used = sum(a.tensor_count for a in planned.adapters)
    dequantized = any(t.quantized or t.training for t in planned.tensors.values())
    return MergeResult(
        output=certificate.parent,
        tensors=planned.counts,
        adapter_tensors={"used": used, "total": used},
        seconds=seconds,
        peak_rss_bytes=peak_rss(),
        delta_survival=audit.survival,
        certificate=certificate,
        base_weights="dequantized" if dequantized else "original",
        dtype=planned.dtype,
        records=tuple(audit.records),
        warnings=tuple(warnings),
        base_checks=tuple(checks),
        interference=between,
    )


def begin_stream(planned: MergePlan, outline: Path, progress: Progress) -> MergedSource:
    """A merge whose large tensors are computed as they are read; `outline` gets the rest of the merged folder."""
    prepare(planned.options.device)
    between = _interference(planned, progress)
    counts = planned.counts
    progress.stage(f"merge: {counts['updated']} weights updated, {counts['copied']} copied, into the export")
    source = MergedSource(planned, outline, interference=between)
    source.warnings += write_outline(source)
    return source


def end_stream(source: MergedSource, certificate: Path, seconds: float, progress: Progress) -> MergeResult:
    """What was merged, with its certificate, once every tensor was hashed. seconds: what reading them took."""
    audit, checks = source.audit, base_checks(source.plan)
    write_sealed(certificate, certificate_of(audit, checks, {}).as_json())
    warnings = [*source.plan.warnings, *source.warnings]
    return _result(audit, checks, warnings, certificate, seconds, source.interference, progress)


def prepare(device: str) -> None:
    """Import torch, which takes a second that is no part of the merge. RuntimeUnavailable without the device."""
    with importing("torch"):
        import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeUnavailable(
            f"--device cuda, and torch {torch.__version__} finds no CUDA device",
            expected="a GPU, its driver, and a torch built for CUDA",
            next_step="--device cpu; `lora-export env` shows what works here",
        )


def _judge(planned: MergePlan, survival: float | None) -> list[str]:
    replaced = planned.counts["replaced"]
    if planned.adapters and survival is None and not replaced:
        return ["the adapter changes nothing: every delta is zero (was it trained, and saved after training?)"]
    if survival is not None and not survival >= 0.9:
        better = "float16 or float32" if planned.dtype == "bfloat16" else "float32"
        return [
            f"only {survival:.0%} of the adapter's change survives rounding to {planned.dtype}: "
            f"try --dtype {better}"
        ]
    return []


def peak_rss() -> int:
    """The largest resident set of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux's ru_maxrss begins with what the parent had at the fork
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
