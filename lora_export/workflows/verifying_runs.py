"""The folder of a whole run checked again: its files, the merge, and the ONNX export that was made of it."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lora_export import manifest
from lora_export.contracts import (
    AdapterChoice,
    Finding,
    MergeOptions,
    Progress,
    QuantizationOptions,
    Verification,
    VerifyOptions,
)
from lora_export.errors import LoraExportError
from lora_export.storage.sealed import read_sealed

_ONNX_UNKNOWN = (
    "the ONNX graph, its weights (quantized or not), weights-map.json, export.json, the runtime's configuration, "
    "and config.json, tokenizer, chat template and generation config beside them"
)


def verify_run(
    run: Path, base: Path | None, adapters: Sequence[AdapterChoice], how: VerifyOptions, progress: Progress
) -> Verification:
    """Check what merge-and-export left. With base and adapters, whatever follows from them is made anew."""
    progress.stage("verify: every file of the run")
    files, left = manifest.verify(run, base, adapters)
    found = [Verification(tuple(files), tuple(left))]
    if not files[0].passed:
        return found[0]
    document = read_sealed(run / manifest.NAME)
    given = base is not None and len(adapters) == len(document["adapters"])
    if (run / "merged").is_dir():
        found += _with_merged_folder(run, base, adapters, document, how, progress, given)
    else:
        found += _streamed(run, base if given else None, adapters, document, how, progress)
    if base is not None and given:
        found.append(_same_options(run, base, adapters, document))
    return Verification(
        tuple(c for v in found for c in v.checks), tuple(dict.fromkeys(n for v in found for n in v.not_checked))
    )


def _with_merged_folder(
    run: Path,
    base: Path | None,
    adapters: Sequence[AdapterChoice],
    document: Mapping[str, Any],
    how: VerifyOptions,
    progress: Progress,
    given: bool,
) -> list[Verification]:
    from lora_export.checkpoint import TensorFiles, open_checkpoint
    from lora_export.merging.certificate.verify import verify_folder

    merged = verify_folder(run / "merged", base, adapters, how, progress)
    if not (run / "onnx").is_dir():
        return [merged]
    if not given or not merged.verified:
        why = "that takes the base (-b) and every adapter (-a)" if merged.verified else "the merged folder is wrong"
        return [merged, Verification(_graphs(run), (f"{_ONNX_UNKNOWN}: {why}",))]
    from lora_export.merging.certificate.document import read_certificate
    from lora_export.onnx_export.weights.recheck import Model, recheck

    source = TensorFiles(open_checkpoint(run / "merged").tensors)
    hashes = {n: h for n, h in sorted(read_certificate(run / "merged").hashes.items()) if h is not None}
    model = Model(run / "merged", source, hashes, _quantization(document))
    return [merged, recheck(run / "onnx", model, how.graph, progress).result()]


def _streamed(
    run: Path,
    base: Path | None,
    adapters: Sequence[AdapterChoice],
    document: Mapping[str, Any],
    how: VerifyOptions,
    progress: Progress,
) -> list[Verification]:
    """A run without a merged folder: its tensors are computed from base (None: not all were given) and adapters."""
    from lora_export.checkpoint.hashing import hash_all
    from lora_export.merging.certificate.streamed_check import merged_again, same_certificate, same_tensors
    from lora_export.merging.certificate.verify import certificate
    from lora_export.merging.running.layout import one_thread_each
    from lora_export.onnx_export import tensor_hashes
    from lora_export.onnx_export.weights.recheck import Model, recheck

    findings, recorded = certificate(run)
    if recorded is None:
        return [findings.result()]
    try:
        same_tensors(findings, recorded, tensor_hashes(run / "onnx"))
    except LoraExportError as error:
        findings.fail("tensors", error.found)
    if base is None:
        findings.not_checked.append(
            f"the merged weights, the figures of the certificate, {_ONNX_UNKNOWN}: that takes the base (-b) and "
            "every adapter (-a)"
        )
        return [findings.result(), Verification(_graphs(run))]
    with tempfile.TemporaryDirectory(prefix="lora-export-") as scratch, one_thread_each():
        try:
            source = merged_again(findings, recorded, base, adapters, Path(scratch) / "outline")
            if source is None:
                return [findings.result()]
            progress.stage(f"verify: all of the merge again, {source.plan.nbytes / 1e6:.0f} MB")
            hashes = hash_all(source)
            same_certificate(findings, recorded, source)
        except LoraExportError as error:
            findings.fail("arithmetic", f"the merge cannot be done again: {error.found}")
            return [findings.result()]
        model = Model(Path(scratch) / "outline", source, hashes, _quantization(document))
        return [findings.result(), recheck(run / "onnx", model, how.graph, progress).result()]


def _graphs(run: Path) -> tuple[Finding, ...]:
    from lora_export.onnx_export.weights.recheck import check_graphs

    return (check_graphs(run / "onnx", "onnx_graphs"),)


def _quantization(document: Mapping[str, Any]) -> QuantizationOptions:
    """What the manifest says was asked for. A calibration is known by its name."""
    asked = document["options"].get("quantization") or {}
    known: dict[str, Any] = {f.name: asked[f.name] for f in fields(QuantizationOptions) if f.name in asked}
    known = {k: tuple(v) if isinstance(v, list) else v for k, v in known.items()}
    if known.get("calibration") is not None:
        known["calibration"] = Path(str(known["calibration"]))
    return QuantizationOptions(**known)


def _same_options(
    run: Path, base: Path, adapters: Sequence[AdapterChoice], document: Mapping[str, Any]
) -> Verification:
    """Whether the options in the manifest, as far as they matter for the bytes, lead to the certificate's."""
    from lora_export.merging import plan
    from lora_export.merging.certificate.document import NAME, effective_options, read_certificate

    folder = run / "merged" if (run / "merged" / NAME).is_file() else run
    try:
        recorded = read_certificate(folder).options
        options = MergeOptions(**document["options"]["merge"])
        effective = effective_options(plan(base, adapters, options))
    except (LoraExportError, TypeError, ValueError) as error:
        return Verification((Finding("manifest", False, f"its options of the merge are none: {error}"),))
    other = sorted(f.name for f in fields(effective) if getattr(effective, f.name) != getattr(recorded, f.name))
    asked, record = document["options"], run / "onnx" / "export.json"
    if record.is_file():
        from lora_export.storage.sealed import read_json

        export = read_json(record)
        other += ["precision"] * (asked.get("precision", export.get("precision")) != export.get("precision"))
    notes = [Finding("manifest", False, f"its option {k} is not what the run was made with") for k in other]
    return Verification(tuple(notes) or (Finding("manifest", True, "its options are those of merge and export"),))
