"""What `package` is asked for, and what it wrote."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class PackageOptions:
    """name: of the model, None for the adapters' names; variants: of the weights, () for the usual ones; provider:
    cpu or cuda, None for that of the run; licence: None for that of the base's card; archive: tar.zst or zip, None
    for a folder; key: a private key to sign with, in PEM; pluggable: an export of the run's base with its adapter
    beside it, which genai gets in the place of the merged model."""

    name: str | None = None
    variants: tuple[str, ...] = ()
    provider: str | None = None
    licence: str | None = None
    archive: str | None = None
    key: Path | None = None
    pluggable: Path | None = None
    force: bool = False


@dataclass(frozen=True)
class PackageResult:
    """What `package` wrote. files: name → bytes; measured: of each variant, beside the run's own export."""

    output: Path
    target: str
    name: str
    files: Mapping[str, int]
    variants: tuple[str, ...]
    measured: Mapping[str, Mapping[str, Any]]
    archive: str | None
    signed: bool
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"output": str(self.output), "bytes": sum(self.files.values())}
