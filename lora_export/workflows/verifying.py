"""A merged folder, a whole run or a package, checked again."""

from collections.abc import Sequence
from pathlib import Path

from lora_export.checkpoint.sources import choices_of
from lora_export.contracts import Progress, Source, Verification, VerifyOptions
from lora_export.errors import InputError
from lora_export.manifest import is_run
from lora_export.workflows import delivered


def verify(
    path: Path,
    base: Source | None,
    adapters: Sequence[tuple[Source, float]],
    how: VerifyOptions,
    progress: Progress,
    *,
    key: Path | None = None,
    run: bool = False,
    runtime: Path | None = None,
) -> Verification:
    """Check again what an earlier command left. InputError if `path` is nothing of the kind.

    key: the public key of who signed a package; run: have its runtime answer the sample; runtime: where that is, if
    not in this environment.
    """
    if not path.exists():
        raise InputError("there is no such folder or archive", where=path)
    packaged = delivered.is_package(path)
    if packaged and (base or adapters):
        raise InputError("--base or --adapter with a package", expected="them with a merged folder or a run")
    if packaged:
        return delivered.verify(path, key, run, runtime, progress)
    if key or run or runtime:
        raise InputError("--key, --run or --runtime without a package", where=path, expected="a package")
    return _verify_folder(path, base, adapters, how, progress)


def _verify_folder(
    path: Path,
    base: Source | None,
    adapters: Sequence[tuple[Source, float]],
    how: VerifyOptions,
    progress: Progress,
) -> Verification:
    """A merged folder, or all of a run folder. InputError if it is neither."""
    from lora_export.merging.certificate.verify import verify_folder
    from lora_export.workflows.verifying_runs import verify_run

    if not path.is_dir():
        raise InputError("there is no such folder", where=path, expected="a merged folder, or that of a whole run")
    choices = choices_of(adapters)
    folder = base.folder if base else None
    if is_run(path):
        return verify_run(path, folder, choices, how, progress)
    return verify_folder(path, folder, choices, how, progress)
