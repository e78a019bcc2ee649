"""What a check of something finished tells."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

_RECOMPUTED = frozenset({"arithmetic", "runs"})  # checks that take base and adapters, or a runtime


@dataclass(frozen=True)
class Finding:
    """One check of what an earlier run left; where it failed, note says what, in which file and tensor."""

    name: str
    passed: bool
    note: str


@dataclass(frozen=True)
class Verification:
    """not_checked: what was not looked at; before the colon what it is, after it why, or what it would take. about:
    further fields of the JSON, by their names."""

    checks: tuple[Finding, ...]
    not_checked: tuple[str, ...] = ()
    about: Mapping[str, object] = field(default_factory=dict)

    @property
    def verified(self) -> bool:
        return bool(self.checks) and all(c.passed for c in self.checks)

    @property
    def verdict(self) -> str:
        """One sentence, with all that was not checked in it."""
        if not self.verified:
            return "NOT verified"
        names = {c.name for c in self.checks}
        good = "the hashes agree; nothing else was checked"
        if names & _RECOMPUTED:
            good = "verified"
        elif "package_files" in names:
            good = "the package is as it was made" + " and signed" * ("signature" in names)
        left = "; ".join(text.partition(":")[0] for text in self.not_checked)
        return f"{good}; not checked: {left}" if left else good

    def as_json(self) -> dict[str, Any]:
        return {
            "verified": self.verified,
            "verdict": self.verdict,
            "checks": [asdict(c) for c in self.checks],
            "not_checked": list(self.not_checked),
            **self.about,
        }
