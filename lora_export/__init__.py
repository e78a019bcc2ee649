"""Take a trained LoRA or QLoRA adapter to production: merge, prove, export, measure, package."""

from typing import TYPE_CHECKING, Any

from lora_export.version import __version__

if TYPE_CHECKING:
    from lora_export.api import benchmark, export, merge, merge_and_export, package, validate, verify

__all__ = ["__version__", "benchmark", "export", "merge", "merge_and_export", "package", "validate", "verify"]


def __getattr__(name: str) -> Any:
    """The functions of the API, imported when somebody asks: `--help` and `inspect` answer without them."""
    if name in __all__:
        from lora_export import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
