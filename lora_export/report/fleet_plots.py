"""Distributions of a fleet's figures as SVG, in the page's CSS variables. Drawn here, not by matplotlib: its import
takes longer than all else that a rerun of a finished fleet does."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from lora_export.report.drawing import drawable

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 460.0, 150.0, 34.0, 24.0, 8.0
_BINS = 30
_WIDE = 30.0  # times between the smallest and the largest figure, from where the axis is logarithmic

_NARROW = 0.02  # of the largest figure: no axis is shorter, whose ticks would all read alike
_FEWEST = 5  # figures that have a distribution


@dataclass(frozen=True)
class Point:
    """A figure of a row; bad: of one that is not there."""

    value: float | None
    bad: bool = False


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    log: bool

    def share(self, value: float) -> float:
        """Where on the axis, from 0 to 1."""
        at, low, high = (math.log10(v) if self.log else v for v in (max(value, self.low), self.low, self.high))
        return min(max((at - low) / (high - low), 0.0), 1.0)

    def edge(self, share: float) -> float:
        if self.log:
            return float(self.low * (self.high / self.low) ** share)
        return self.low + share * (self.high - self.low)

    def ticks(self) -> Iterator[float]:
        if self.log:
            decades = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            every = max(1, math.ceil(len(decades) / 6))
            yield from (float(10.0**power) for power in decades if power % every == 0)
            return
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / 3))
        step *= next(m for m in (1, 2, 5, 10) if (self.high - self.low) / (step * m) <= 6)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        yield from (n * step for n in range(first, last + 1))


def histogram(points: Sequence[Point], label: str, words: Callable[[float], str]) -> str | None:
    """How many rows have which figure; rows that are not there in another colour, a line at the median. None for
    less than five figures that can be drawn. words: a figure as text.
    """
    known = [(v, p.bad) for p in points if (v := drawable(p.value)) is not None]
    if len(known) < _FEWEST:
        return None
    axis = _axis([v for v, _ in known])
    counts = [[0, 0] for _ in range(_BINS)]
    for value, bad in known:
        counts[min(int(axis.share(value) * _BINS), _BINS - 1)][bad] += 1
    most = max(sum(pair) for pair in counts)
    parts = [*_frame(axis, most, words), *_bars(axis, counts, most, words)]
    middle = sorted(v for v, _ in known)[len(known) // 2]
    x = _x(axis.share(middle))
    parts.append(
        f'<path d="M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}" stroke="var(--ink)" stroke-dasharray="3 3">'
        f"<title>{escape(f'median {words(middle)}')}</title></path>"
    )
    return (
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" font-size="10">'
        f"{''.join(parts)}</svg>"
    )


def _axis(values: Sequence[float]) -> _Axis:
    low, high = min(values), max(values)
    positive = [v for v in values if v > 0]
    if positive and low >= 0 and high > _WIDE * (smallest := min(positive)):
        # Zeros stand at the left end.
        return _Axis(smallest, high, True)
    narrowest = _NARROW * max(abs(low), abs(high)) or 1.0
    around = max(0.0, narrowest - (high - low)) / 2
    return _Axis(low - around, high + around, False)


def _x(share: float) -> float:
    return _LEFT + share * (_WIDTH - _LEFT - 8)


def _frame(axis: _Axis, most: int, words: Callable[[float], str]) -> Iterator[str]:
    floor = _HEIGHT - _BOTTOM
    yield f'<path d="M{_LEFT} {floor}H{_WIDTH - 8}" stroke="var(--rule)"/>'
    yield f'<text x="{_LEFT - 6}" y="{_TOP + 8}" text-anchor="end" fill="var(--muted)">{most:,}</text>'
    yield f'<text x="{_LEFT - 6}" y="{floor}" text-anchor="end" fill="var(--muted)">0</text>'
    for tick in axis.ticks():
        x = _x(axis.share(tick))
        yield f'<path d="M{x:.1f} {floor}v4" stroke="var(--rule)"/>'
        place = f'x="{x:.1f}" y="{floor + 16}" text-anchor="middle"'
        yield f'<text {place} fill="var(--muted)">{escape(words(tick))}</text>'


def _bars(axis: _Axis, counts: Sequence[Sequence[int]], most: int, words: Callable[[float], str]) -> Iterator[str]:
    floor, width = _HEIGHT - _BOTTOM, (_x(1) - _x(0)) / _BINS
    for at, (good, bad) in enumerate(counts):
        y = floor
        span = f"{words(axis.edge(at / _BINS))} to {words(axis.edge((at + 1) / _BINS))}"
        for number, colour, of in ((good, "--arm-merged", ""), (bad, "--bad", " not there")):
            if number:
                height = max(number / most * (floor - _TOP), 1.5)
                y -= height
                yield (
                    f'<rect x="{_x(at / _BINS) + 0.5:.1f}" y="{y:.1f}" width="{width - 1:.1f}" '
                    f'height="{height:.1f}" fill="var({colour})">'
                    f"<title>{escape(f'{number:,}{of}: {span}')}</title></rect>"
                )
