"""A merged folder, a whole run or a package, checked again."""

from collections.abc import Sequence
from pathlib import Path

from lora_export.contracts import AdapterChoice, Progress, Verification, VerifyOptions
from lora_export.errors import InputError
from lora_export.manifest import is_run
from lora_export.workflows import delivered


def verify(
    path: Path, base: Path | None, adapters: Sequence[AdapterChoice], options: VerifyOptions, progress: Progress
) -> Verification:
    """Check again what an earlier command left. InputError if `path` is nothing of the kind."""
    from lora_export.merging.certificate.verify import verify_folder
    from lora_export.workflows.verifying_runs import verify_run

    if not path.exists():
        raise InputError("there is no such folder or archive", where=path)
    packaged = delivered.is_package(path)
    if packaged and (base or adapters):
        raise InputError("--base or --adapter with a package", expected="them with a merged folder or a run")
    if packaged:
        return delivered.verify(path, options.key, options.run, options.runtime, progress)
    if options.key or options.run or options.runtime:
        raise InputError("--key, --run or --runtime without a package", where=path, expected="a package")
    if not path.is_dir():
        raise InputError("there is no such folder", where=path, expected="a merged folder, or that of a whole run")
    again = verify_run if is_run(path) else verify_folder
    return again(path, base, adapters, options, progress)
