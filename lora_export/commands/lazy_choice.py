"""The type of an option whose values depend on what is installed."""

from collections.abc import Callable, Sequence

import click


class LazyChoice(click.Choice[str]):
    """A choice whose values are looked up when help is printed or a value is given."""

    def __init__(self, values: Callable[[], Sequence[str]]) -> None:
        self._values = values
        self.case_sensitive = True

    @property
    def choices(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(self._values())
