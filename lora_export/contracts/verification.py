"""What a check of something finished tells."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One check of what an earlier run left; where it failed, note says what, in which file and tensor."""

    name: str
    passed: bool
    note: str


@dataclass(frozen=True)
class Verification:
    """not_checked: what could not be looked at, in words, and what it would take. about: further fields of the
    JSON, by their names."""

    checks: tuple[Finding, ...]
    not_checked: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verified(self) -> bool:
        return bool(self.checks) and all(c.passed for c in self.checks)

    def as_json(self) -> dict[str, Any]:
        return {
            "verified": self.verified,
            "checks": [asdict(c) for c in self.checks],
            "not_checked": list(self.not_checked),
            **self.about,
        }
