"""A merged folder and its exports against the unmerged model, as an earlier run left them."""

import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from lora_export.allowed import check_adapter_folder, check_model_folder
from lora_export.checkpoint import open_adapter_files
from lora_export.checkpoint.sources import resolve
from lora_export.choices import Provider
from lora_export.contracts import (
    AdapterChoice,
    CompareBases,
    ExportedPair,
    ExportOptions,
    ExportResult,
    MergeOptions,
    Progress,
    QuantizationOptions,
    Source,
    ValidationOptions,
    ValidationResult,
)
from lora_export.contracts.option import names
from lora_export.errors import InputError, LoraExportError
from lora_export.storage.sealed import refuse_special
from lora_export.workflows.bare_base import without_adapter
from lora_export.workflows.held_out import calibrations, refuse_calibrated
from lora_export.workflows.run_graphs import with_graph_of
from lora_export.workflows.trained_base import prepared_base, stand_in


def validate_folder(
    base: Source,
    adapters: Sequence[AdapterChoice],
    merged: Path,
    onnx: Sequence[Path],
    base_onnx: Sequence[Path],
    options: ValidationOptions,
    progress: Progress,
    own_texts: Sequence[Path] = (),
) -> ValidationResult:
    """Validate what an earlier run left.

    onnx: exports in different precisions; base_onnx: the base exported in the same ways and order, or none: then it
    is exported anew for each. own_texts: a text for each adapter, on which is measured what the merged model has
    left of it.
    """
    from lora_export.onnx_export import load_export
    from lora_export.runtime import resolve_provider
    from lora_export.validation import validate
    from lora_export.validation.effect.retention import own_texts as measure

    for folder in (base.folder, merged, *(a.folder for a in adapters), *onnx, *base_onnx):
        refuse_special(folder)
    exports = [load_export(folder) for folder in onnx]
    _check_exports(exports, base_onnx)
    _check_folders(base, adapters, merged, [*exports, *map(load_export, base_onnx)])
    _check_own_texts(own_texts, adapters)
    refuse_calibrated(calibrations([*exports, *map(load_export, base_onnx)]), options, own_texts)
    given = options.merge
    options = replace(
        options, bases=_with_original(options.bases), merge=merged_with(merged, base.folder, adapters, options)
    )
    provider: Provider = resolve_provider(options.provider) if onnx else "cpu"
    with tempfile.TemporaryDirectory(prefix="lora-export-") as scratch:
        work = Path(scratch)
        base = replace(base, folder=without_adapter(base.folder, work))
        bases = base_onnx or [
            _export_base(base.folder, adapters, exported, work, options.merge, provider, progress)
            for exported in exports
        ]
        pairs = [
            pair_of(exported, same, "onnx_" if exported is exports[0] else f"onnx_{exported.precision}_")
            for exported, same in zip(exports, bases, strict=True)
        ]
        readable = stand_in(base.folder, merged, options.merge, options.max_memory, work, progress)
        again = _again(merged, onnx[0]) if onnx else options.again
        result = validate(
            base.folder, adapters, merged, exports=pairs, dequantized=readable, progress=progress,
            options=replace(options, provider=provider, again=again),
        )  # fmt: skip
        result = replace(result, merge_options=only_certified(options.merge, given))
        if not own_texts:
            return result
        kept = measure(base.folder, adapters, merged, own_texts, options.merge, readable, progress)
        return replace(
            result,
            perplexities=(*result.perplexities, *kept.perplexities),
            adapter_survival=(*result.adapter_survival, *kept.adapter_survival),
        )


def _with_original(bases: CompareBases | None) -> CompareBases | None:
    """With the folder of the original base, which may be named by its Hub ID."""
    if bases is None or bases.original is None:
        return bases
    return replace(bases, original=resolve(str(bases.original)).folder)


def merged_with(
    merged: Path, base: Path, adapters: Sequence[AdapterChoice], options: ValidationOptions
) -> MergeOptions:
    """The options of the merge that made `merged`: those of its certificate, or without one those that were given.

    InputError if one that was stated contradicts the certificate. Those that do not affect the result (memory,
    device) are the caller's.
    """
    from lora_export.merging import CERTIFICATE
    from lora_export.merging.certificate.document import read_certificate

    default, given = MergeOptions(), options.merge
    if not (merged / CERTIFICATE).is_file():
        return given
    recorded = read_certificate(merged).options
    free = names(MergeOptions, lambda how: not how.changes_result)
    differing = [n for n in asdict(default) if n not in free and getattr(given, n) != getattr(recorded, n)]
    if options.stated is None:
        differing = [n for n in differing if getattr(given, n) != getattr(default, n)]
    else:
        differing = [n for n in differing if n in options.stated]
    for name in _contradicting(differing, base, adapters, recorded, given):
        flag = f"--{name.replace('_', '-')}"
        raise InputError(
            f"{flag} {getattr(given, name)}, but the folder was merged with {getattr(recorded, name)}",
            where=merged / CERTIFICATE,
            expected="the options of the merge, which its certificate has, or none",
            next_step=f"the same command without {flag}",
        )
    own = {name: getattr(given, name) for name in free}
    own["allow_nonfinite"] = given.allow_nonfinite or recorded.allow_nonfinite
    return replace(recorded, **own)


def only_certified(merged: MergeOptions, given: MergeOptions) -> tuple[str, ...]:
    """The options that decide what is right, and that the caller did not state: the merged folder's own word."""
    changing = names(MergeOptions, lambda how: how.changes_result)
    return tuple(f"{n} {getattr(merged, n)}" for n in changing if getattr(merged, n) != getattr(given, n))


def _contradicting(
    differing: Sequence[str], base: Path, adapters: Sequence[AdapterChoice], recorded: MergeOptions,
    given: MergeOptions,
) -> Sequence[str]:  # fmt: skip
    """Those that matter for this merge: a certificate has the defaults of the others."""
    from lora_export.merging import plan
    from lora_export.merging.certificate.document import effective_options

    if not differing:
        return ()
    try:
        planned = plan(base, adapters, replace(recorded, **{n: getattr(given, n) for n in differing}))
    except LoraExportError:
        return differing
    effective = effective_options(planned)
    return [n for n in differing if getattr(effective, n) != getattr(recorded, n)]


def _check_own_texts(own_texts: Sequence[Path], adapters: Sequence[AdapterChoice]) -> None:
    if own_texts and len(own_texts) != len(adapters):
        raise InputError(
            f"{len(own_texts)} × --own-text and {len(adapters)} × -a",
            expected="one text for each adapter, in the same order",
            next_step="the same command with an --own-text for each -a",
        )


def _check_folders(
    base: Source, adapters: Sequence[AdapterChoice], merged: Path, exports: Sequence[ExportResult]
) -> None:
    """Refuse what a runtime must not read, before any does."""
    from lora_export.onnx_export import check_export

    check_model_folder(merged)
    for folder in (base.folder, *(a.folder for a in adapters)):
        check_adapter_folder(folder)
    for adapter in adapters:
        open_adapter_files(adapter.folder)
    for exported in exports:
        check_export(exported.output, exported.graphs)


def _check_exports(exports: Sequence[ExportResult], bases: Sequence[Path]) -> None:
    precisions = [e.precision for e in exports]
    twice = next((p for p in precisions if precisions.count(p) > 1), None)
    if twice is not None:
        raise InputError(
            f"two of the exports are in {twice}",
            where=[e.output for e in exports if e.precision == twice][1],
            expected="one --onnx for each precision, which names their checks",
            next_step="validate them one at a time",
        )
    if bases and len(bases) != len(exports):
        raise InputError(
            f"{len(exports)} × --onnx and {len(bases)} × --base-onnx",
            expected="one --base-onnx for each --onnx, in the same order and the same precisions, or none",
            next_step="drop --base-onnx: the base is then exported the same way, and deleted",
        )


def _export_base(
    base: Path,
    adapters: Sequence[AdapterChoice],
    like: ExportResult,
    work: Path,
    merge: MergeOptions,
    provider: Provider,
    progress: Progress,
) -> Path:
    """The base that the adapter belongs to, exported as `like` was: with its graph, if that takes other weights."""
    from lora_export.onnx_export.quantize.activations import reproducible

    if like.activations == "static" and not reproducible(like.calibration):
        progress.warn(
            "the base's activations are calibrated on the built-in page, the export's on a text that it does "
            "not keep: pass --base-onnx with an export of the base that was calibrated on it"
        )
    quantization = QuantizationOptions(activations=like.activations)
    same = ExportOptions(like.precision, provider, like.engine, quantization=quantization)
    weights = work / "base-weights"
    trained_on = weights if weights.is_dir() else prepared_base(base, adapters, merge, work, progress)
    what, output = f"the base in {like.precision}, for the noise floor", work / f"base-{like.precision}"
    progress.stage(f"export: {what}")
    return with_graph_of(like, trained_on, output, same, progress, what).output


def pair_of(exported: ExportResult, base: Path, prefix: str = "onnx_") -> ExportedPair:
    size = exported.nbytes
    precision, how = exported.precision, exported.activations
    return ExportedPair(exported.output, base, precision, size, prefix, exported.graphs, how)


def _again(merged: Path, onnx: Path) -> str:
    """The commands that try another precision of what was validated."""
    other = f"{shlex.quote(str(onnx))}-{{precision}}"
    export = f"lora-export export -m {shlex.quote(str(merged))} -o {other} --precision {{precision}}"
    return f"{export}, and then this command with --onnx {other}"
