"""A merged folder, a whole run or a package, checked again."""

import tempfile
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from lora_export import manifest
from lora_export.contracts import (
    AdapterChoice,
    Finding,
    MergeOptions,
    Progress,
    Verification,
    VerifyOptions,
)
from lora_export.contracts.option import names
from lora_export.errors import InputError, LoraExportError
from lora_export.manifest import RunManifest
from lora_export.storage.sealed import read_json
from lora_export.workflows.fleet.verifying import is_root, verify_root

_ONNX_UNKNOWN = (
    "the ONNX graph, its weights (quantized or not), weights-map.json, export.json, the runtime's configuration, "
    "and config.json, tokenizer, chat template and generation config beside them"
)
_TAKES_ALL = "checking that takes the base (-b) and every adapter (-a)"


def verify(
    path: str | Path,
    base: Path | None,
    adapters: Sequence[AdapterChoice],
    options: VerifyOptions,
    progress: Progress,
) -> Verification:
    """Check again what an earlier command left. InputError if `path` is nothing of the kind."""
    if is_root(str(path)):
        if base or adapters or options.key or options.run or options.runtime:
            raise InputError(
                "--base, --adapter, --key, --run or --runtime with the root of a fleet", where=str(path)
            )
        return verify_root(str(path), progress)
    return _verify_folder(Path(path), base, adapters, options, progress)


def _verify_folder(
    path: Path, base: Path | None, adapters: Sequence[AdapterChoice], options: VerifyOptions, progress: Progress
) -> Verification:
    from lora_export.checkpoint.pipeline import is_pipeline
    from lora_export.merging.certificate.verify import verify_folder
    from lora_export.merging.pipelines.verifying import verify_pipeline
    from lora_export.workflows import delivered

    if not path.exists():
        raise InputError("no such folder or archive", where=path)
    packaged = delivered.is_package(path)
    if packaged and (base or adapters):
        raise InputError("--base or --adapter with a package", expected="a merged folder or a run")
    if packaged:
        return delivered.verify(path, options.key, options.run, options.runtime, progress)
    if options.key or options.run or options.runtime:
        raise InputError("--key, --run or --runtime without a package", where=path, expected="a package")
    if not path.is_dir():
        raise InputError(
            "this file is no package",
            where=path,
            expected="a merged folder, a run, a package, or the root of a fleet",
        )
    if manifest.is_run(path):
        return verify_run(path, base, adapters, options, progress)
    pipeline = is_pipeline(path) or (base is not None and base.is_dir() and is_pipeline(base))
    check = verify_pipeline if pipeline else verify_folder
    return check(path, base, adapters, options, progress)


def check_run(run: Path, base: Path | None, adapters: Sequence[AdapterChoice]) -> tuple[list[Finding], list[str]]:
    """The files of a run against its manifest, and that against the certificate; (checks, what was not checked)."""
    from lora_export.merging.certificate.document import NAME, read_certificate
    from lora_export.merging.pipelines.document import is_merged_pipeline, read_pipeline_certificate

    as_given = names(MergeOptions, lambda option: not option.conditional and option.json is not None)
    checks, not_checked = manifest.verify(run, base, adapters)
    for folder in (run / "merged", run):  # the second without a merged folder
        if checks[0].passed and (folder / NAME).is_file():
            given = manifest.read(run).recorded_options.merge
            try:
                own = read_pipeline_certificate if is_merged_pipeline(folder) else read_certificate
                recorded = own(folder).options
            except LoraExportError:  # the check of the certificate reports it
                continue
            if any(getattr(given, k) != getattr(recorded, k) for k in as_given):
                checks.append(Finding("manifest", False, "its merge options are not those of the certificate"))
    return checks, not_checked


def verify_run(
    run: Path, base: Path | None, adapters: Sequence[AdapterChoice], how: VerifyOptions, progress: Progress
) -> Verification:
    """Check what merge-and-export left. With base and adapters, everything that follows from them is made again."""
    progress.stage("verify: checking every file of the run")
    files, left = check_run(run, base, adapters)
    results = [Verification(tuple(files), tuple(left))]
    if not files[0].passed:
        return results[0]
    document = manifest.read(run)
    given = base is not None and len(adapters) == len(document.adapters)
    if _is_pipeline(run / "merged"):
        from lora_export.workflows.pipelines.verifying import verify_models

        why_not = None if given else f"{_ONNX_UNKNOWN}: {_TAKES_ALL}"
        results += verify_models(run, base, adapters, document.recorded_options, how, progress, why_not)
    elif (run / "merged").is_dir():
        results += _with_merged_folder(run, base, adapters, document, how, progress, given)
    else:
        results += _streamed(run, base if given else None, adapters, document, how, progress)
    if base is not None and given:
        results.append(_same_options(run, base, adapters, document))
    return Verification(
        tuple(c for v in results for c in v.checks), tuple(dict.fromkeys(n for v in results for n in v.not_checked))
    )


def _is_pipeline(folder: Path) -> bool:
    """Whether a merged folder is a pipeline; False for a damaged one, of which its check says what is wrong."""
    from lora_export.checkpoint.pipeline import is_pipeline

    try:
        return is_pipeline(folder)
    except InputError:
        return False


def _with_merged_folder(
    run: Path,
    base: Path | None,
    adapters: Sequence[AdapterChoice],
    document: RunManifest,
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
        why = _TAKES_ALL if merged.verified else "the merged folder failed its checks"
        return [merged, Verification(_graphs(run), (f"{_ONNX_UNKNOWN}: {why}",))]
    from lora_export.merging.certificate.document import read_certificate
    from lora_export.onnx_export.weights.recheck import Model, recheck

    source = TensorFiles(open_checkpoint(run / "merged").tensors)
    recorded = read_certificate(run / "merged")
    hashes = {n: h for n, h in sorted(recorded.hashes.items()) if h is not None}
    quantization = replace(document.recorded_options.quantization, touched=recorded.touched)
    model = Model(run / "merged", source, hashes, quantization)
    return [merged, recheck(run / "onnx", model, how.graph, progress).result()]


def _streamed(
    run: Path,
    base: Path | None,
    adapters: Sequence[AdapterChoice],
    document: RunManifest,
    how: VerifyOptions,
    progress: Progress,
) -> list[Verification]:
    """A run without a merged folder: its tensors are computed from base (None: not all were given) and adapters."""
    from lora_export.checkpoint.hashing import hash_all
    from lora_export.merging.certificate.streamed_check import merged_again, same_certificate, same_tensors
    from lora_export.merging.certificate.verify import certificate
    from lora_export.merging.running.layout import one_thread_each
    from lora_export.onnx_export.weights.recheck import Model, recheck

    findings, recorded = certificate(run)
    if recorded is None:
        return [findings.result()]
    try:
        same_tensors(findings, recorded, _of_model(run / "onnx"))
    except LoraExportError as error:
        findings.fail("tensors", error.found)
    if base is None:
        findings.not_checked.append(
            f"the merged weights, the figures of the certificate, {_ONNX_UNKNOWN}: {_TAKES_ALL}"
        )
        return [findings.result(), Verification(_graphs(run))]
    with tempfile.TemporaryDirectory(prefix="lora-export-") as scratch, one_thread_each():
        try:
            source = merged_again(findings, recorded, base, adapters, Path(scratch) / "outline")
            if source is None:
                return [findings.result()]
            progress.stage(f"verify: merging everything again, {source.plan.nbytes / 1e6:.0f} MB")
            hashes = hash_all(source)
            same_certificate(findings, recorded, source)
        except LoraExportError as error:
            findings.fail("arithmetic", f"the merge cannot be repeated: {error.found}")
            return [findings.result()]
        quantization = replace(document.recorded_options.quantization, touched=recorded.touched)
        model = Model(Path(scratch) / "outline", source, hashes, quantization)
        return [findings.result(), recheck(run / "onnx", model, how.graph, progress).result()]


def _of_model(export: Path) -> dict[str, str]:
    """The hashes of the model's tensors, without those of sentence-transformers' modules beside it."""
    from lora_export.checkpoint.sentence import module_tensors
    from lora_export.onnx_export import tensor_hashes

    beside = module_tensors(export)
    return {name: hashed for name, hashed in tensor_hashes(export).items() if name not in beside}


def _graphs(run: Path) -> tuple[Finding, ...]:
    from lora_export.onnx_export.weights.recheck import check_graphs

    return (check_graphs(run / "onnx", "onnx_graphs"),)


def _same_options(run: Path, base: Path, adapters: Sequence[AdapterChoice], document: RunManifest) -> Verification:
    """Whether the options in the manifest, as far as the bytes depend on them, lead to those of the certificate."""
    from lora_export.merging import plan
    from lora_export.merging.certificate.document import NAME, effective_options, read_certificate
    from lora_export.workflows.pipelines.verifying import odd_options

    folder = run / "merged" if (run / "merged" / NAME).is_file() else run
    options = document.recorded_options
    try:
        if _is_pipeline(folder):
            other = odd_options(folder, base, adapters, options)
        else:
            recorded = read_certificate(folder).options
            effective = effective_options(plan(base, adapters, options.merge))
            every = (f.name for f in fields(effective))
            other = sorted(n for n in every if getattr(effective, n) != getattr(recorded, n))
    except LoraExportError as error:
        return Verification((Finding("manifest", False, f"its merge options are not valid: {error.found}"),))
    record = run / "onnx" / "export.json"
    if record.is_file() and options.precision:
        other += ["precision"] * (options.precision != read_json(record).get("precision"))
    notes = [Finding("manifest", False, f"the run was not made with its option {k}") for k in other]
    return Verification(tuple(notes) or (Finding("manifest", True, "its options are those of merge and export"),))
