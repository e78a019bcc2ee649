"""What `package` wrote."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


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
