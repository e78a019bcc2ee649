"""The runtimes that packages are made for, each in a file of its own."""

from lora_export import registered
from lora_export.errors import InputError
from lora_export.packages.job import PackageTarget


def targets() -> dict[str, PackageTarget]:
    """Name → target: the built-in ones, then those of plug-ins."""
    return registered.registered(registered.TARGETS, PackageTarget)  # type: ignore[type-abstract]


def target_named(name: str) -> PackageTarget:
    """InputError for a target that is not installed."""
    known = targets()
    if name not in known:
        raise InputError(
            f"no target {name!r} is installed",
            expected=", ".join(known),
            next_step="install the package that brings it, or choose another --for",
        )
    return known[name]
