"""What `package` wrote."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class PackageResult:
    """What `package` wrote. files: name → bytes; bytes: of all files; measured: how each variant compares with the
    run's own export."""

    output: Path
    target: str
    name: str
    files: Mapping[str, int]
    variants: tuple[str, ...]
    measured: Mapping[str, Mapping[str, object]]
    archive: str | None
    signed: bool
    seconds: float
    bytes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bytes", sum(self.files.values()))
