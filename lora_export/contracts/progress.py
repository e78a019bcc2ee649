"""Talk for a person, and where a model came from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Source:
    """A base or adapter as named by the user, the folder it was found in, and the commit it was pinned to."""

    name: str
    folder: Path
    commit: str | None = None


class Progress(Protocol):
    """Talk for a person; stages report to it and never print."""

    def stage(self, title: str) -> None: ...

    def detail(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def advance(self, done: int, total: int) -> None: ...
