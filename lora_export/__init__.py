"""Take a trained LoRA or QLoRA adapter to production: merge, prove, export, measure, package."""

from typing import TYPE_CHECKING, Any

from lora_export.version import __version__

if TYPE_CHECKING:
    from lora_export.api import (
        benchmark,
        combine,
        env,
        export,
        extract,
        inspect,
        merge,
        merge_and_export,
        package,
        plan,
        plan_fleet,
        switch,
        truncate,
        understand,
        validate,
        verify,
    )

# All functions of api but `report` and `fleet`, which have the names of rooms: from lora_export.api import fleet.
__all__ = [
    "__version__", "benchmark", "combine", "env", "export", "extract", "inspect", "merge", "merge_and_export",
    "package", "plan", "plan_fleet", "switch", "truncate", "understand", "validate", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """The functions of the API, imported at their first use: `--help` and `inspect` answer without them."""
    if name in __all__:
        from lora_export import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
