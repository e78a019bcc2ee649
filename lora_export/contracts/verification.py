"""What a check of something finished tells."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from lora_export.contracts.figures import NOT_IN_JSON
from lora_export.errors import plain

_RECOMPUTED = frozenset({"arithmetic", "runs"})  # checks that take base and adapters, or a runtime
_OF_A_FLEET = frozenset({"objects", "bases", "failed"})


@dataclass(frozen=True)
class Finding:
    """One check of what an earlier run left; where it failed, note says what, in which file and tensor."""

    name: str
    passed: bool
    note: str


@dataclass(frozen=True)
class Verification:
    """verdict: one sentence, which names all that was not checked; not_checked: before the colon what was not
    looked at, after it why, or what it would take; about: further fields of the JSON, by their names."""

    verified: bool = field(init=False)  # whether there are checks, and none of them failed
    verdict: str = field(init=False)
    checks: tuple[Finding, ...]
    not_checked: tuple[str, ...] = ()
    about: Mapping[str, object] = field(default_factory=dict, metadata=NOT_IN_JSON)

    def __post_init__(self) -> None:
        object.__setattr__(self, "verified", bool(self.checks) and all(c.passed for c in self.checks))
        object.__setattr__(self, "verdict", self._verdict() if self.verified else "NOT verified")

    def _verdict(self) -> str:
        names = {c.name.rpartition(": ")[2] for c in self.checks}  # of a pipeline's component: "unet: arithmetic"
        good = "the hashes agree; nothing else was checked"
        if names & _RECOMPUTED:
            good = "verified"
        elif "package_files" in names:
            good = "the package is as it was made" + " and signed" * ("signature" in names)
        elif names & _OF_A_FLEET:
            good = "every object is as its record says"
        left = "; ".join(text.partition(":")[0] for text in self.not_checked)
        return f"{good}; not checked: {left}" if left else good


@dataclass
class Findings:
    """What was checked. A name that nothing failed under is a check that passed."""

    done: list[Finding] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)

    def judge(self, name: str, passed: str, failures: Iterator[str] | Sequence[str]) -> None:
        failed = [Finding(name, False, plain(note)) for note in failures]
        self.done += failed or [Finding(name, True, plain(passed))]

    def fail(self, name: str, note: str) -> None:
        self.done.append(Finding(name, False, plain(note)))

    def result(self) -> Verification:
        return Verification(tuple(self.done), tuple(self.not_checked))
