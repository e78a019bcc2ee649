"""Types of what is given on the command line: sizes, shares, durations."""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import click


class Size(click.ParamType[int]):
    """A number of bytes, written as 5GB, 256MB or 2GiB."""

    name = "size"
    _UNITS: ClassVar = {
        "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
        "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
    }  # fmt: skip

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = str(value).strip().lower()
        digits = text.rstrip("bgikmt")
        try:
            size = int(float(digits) * self._UNITS[text[len(digits) :].strip()])
        except (ValueError, KeyError, OverflowError):
            self.fail(f"{value!r} is not a size such as 5GB, 256MB or 2GiB", param, ctx)
        if size <= 0:
            self.fail("a size must be above 0", param, ctx)
        return size


class FiniteRange(click.FloatRange):
    """A number in a range, which NaN and infinity are not."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


class Share(click.ParamType[float]):
    """A share within bounds, as 1% or 0.01."""

    name = "share"

    def __init__(self, least: float | None, most: float | None) -> None:
        self.least, self.most = least or 0.0, 1.0 if most is None else most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            self.fail(f"{value!r} is not a share; write 1% or 0.01.", param, ctx)
        if not self.least <= share <= self.most:
            self.fail(f"{value!r} is not between {self.least:.2%} and {self.most:.0%}.", param, ctx)
        return share


class Duration(click.ParamType[float]):
    """Seconds, at least one, as 90, 90s, 5m or 1h."""

    name = "duration"
    _UNITS: ClassVar = {"s": 1, "m": 60, "h": 3600}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip()
        unit = self._UNITS.get(text[-1:], 0)
        try:
            seconds = float(text[:-1] if unit else text) * (unit or 1)
        except ValueError:
            self.fail(f"{value!r} is not a time; write 90, 90s or 5m.", param, ctx)
        if not 1 <= seconds <= 7 * 24 * 3600:
            self.fail(f"{value!r} is not between a second and a week.", param, ctx)
        return seconds


# By the unit that an Option names: the type that reads it within bounds.
SPELLED: dict[str, Callable[[float | None, float | None], click.ParamType[Any]]] = {
    "bytes": lambda least, most: Size(),
    "share": Share,
    "seconds": lambda least, most: Duration(),
}


class LazyChoice(click.Choice[str]):
    """A choice whose values are looked up when help is printed or a value is given."""

    def __init__(self, values: Callable[[], Sequence[str]]) -> None:
        self._values = values
        self.case_sensitive = True

    @property
    def choices(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(self._values())
