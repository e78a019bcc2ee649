"""Figures of latency: how its samples are spread, the ratios before the margin, what the other arms cost."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lora_export.contracts import BenchmarkResult, Cell, Samples
from lora_export.escape import one_line
from lora_export.report.drawing import (
    BAND,
    BASE,
    INK,
    MERGED,
    MUTED,
    OTHER,
    PLUGGED,
    PYTORCH,
    UNMERGED,
    drawable,
    figure,
    quiet,
    svg,
)
from lora_export.report.latency import cell_name, margin_of
from lora_export.wording import VERDICTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

_COLOURS = {"base": BASE, "merged": MERGED, "unmerged": UNMERGED, "plugged": PLUGGED, "pytorch": PYTORCH}
_POINTS = 160
_WIDE = 3.0  # times between the fastest and the slowest arm, from where the axis is logarithmic


def latency(bench: BenchmarkResult, samples: Samples) -> str | None:
    """For each cell and arm a violin of the raw samples, with its median and p95."""
    known = [(cell, _pooled(samples.get(cell.key, {}))) for cell in bench.cells]
    cells = [cell for cell, arms in known if arms]
    pooled = [arms for _, arms in known if arms]
    if not cells:
        return None
    with figure(0.55 * len(cells) + 0.3 * sum(len(arms) for arms in pooled) + 0.5) as fig:
        heights = [len(arms) for arms in pooled]
        axes = fig.subplots(len(cells), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
        for ax, cell, arms in zip(axes, cells, pooled, strict=True):
            _violins(ax, arms)
            ax.set_title(cell_name(cell), loc="left", fontsize=9, color=INK)
        axes[-1].set_xlabel("milliseconds")
        return svg(fig, "Latency of every arm in each cell")


def _pooled(arms: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Both sessions of the base as one arm, which is how its median was taken; arms without a sample are left
    out."""
    pooled: dict[str, list[float]] = {"base": []}
    for name, times in arms.items():
        arm = "base" if name == "base_again" else name
        pooled.setdefault(arm, []).extend(t for t in times if drawable(t) is not None)
    return {name: times for name, times in pooled.items() if times}


def _violins(ax: "Axes", arms: Mapping[str, Sequence[float]]) -> None:
    medians = [float(np.median(times)) for times in arms.values()]
    if min(medians) > 0 and max(medians) > _WIDE * min(medians):
        from matplotlib.ticker import LogLocator, NullLocator

        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for row, (name, times) in enumerate(reversed(list(arms.items()))):
        values, colour = np.asarray(times, float), _COLOURS.get(name, OTHER)
        x, width = _density(values)
        ax.fill_between(x, row - 0.42 * width, row + 0.42 * width, color=colour, alpha=0.35, lw=0)
        median, p95 = np.quantile(values, [0.5, 0.95])
        ax.plot(median, row, "o", color=colour, ms=5, markeredgecolor=INK, markeredgewidth=0.6)
        ax.plot([p95, p95], [row - 0.25, row + 0.25], color=colour, lw=1.4)
    ax.set_yticks(range(len(arms)), [one_line(name) for name in reversed(list(arms))])
    ax.set_ylim(-0.6, len(arms) - 0.4)
    quiet(ax, "x")


def _density(values: "Array") -> "tuple[Array, Array]":
    """Where the samples lie, without their slowest hundredth, and how many lie there, as a share of the most."""
    from scipy.stats import gaussian_kde

    shown = values[values <= np.quantile(values, 0.99)]
    low, high = float(shown.min()), float(shown.max())
    if len(shown) < 3 or high - low <= 1e-9 * high:
        edge = max(abs(high), 1e-3) * 1e-3
        return np.array([low - edge, low, high, high + edge]), np.array([0.0, 1.0, 1.0, 0.0])
    x = np.linspace(low, high, _POINTS)
    density = gaussian_kde(shown)(x)
    return x, density / density.max()


def forest(bench: BenchmarkResult) -> str | None:
    """Merged against base in percent with its 90 % interval, and base against base, before the band of the
    margin."""
    known = [(cell, drawable(cell.ratio)) for cell in bench.cells]
    cells = [(cell, ratio) for cell, ratio in reversed(known) if ratio is not None]
    if not cells:
        return None
    with figure(0.42 * len(cells) + 1.0) as fig:
        ax = fig.subplots()
        margin = margin_of(bench)
        if margin:
            ax.axvspan(100 * (1 / (1 + margin) - 1), 100 * margin, color=BAND, lw=0)
        ax.axvline(0, color=MUTED, lw=0.8)
        for row, (cell, ratio) in enumerate(cells):
            floor = drawable(cell.noise_floor)
            if floor is not None:
                ax.plot([-100 * floor, 100 * floor], [row - 0.25, row - 0.25], color=BASE, lw=4, alpha=0.5)
            _interval(ax, row, cell.ci_low, cell.ci_high, color=MERGED, lw=2)
            ax.plot(100 * (ratio - 1), row, "o", color=MERGED, ms=5.5, markeredgewidth=0)
        ax.set_yticks(range(len(cells)), [f"{cell_name(c)}\n{VERDICTS[c.verdict]}" for c, _ in cells])
        ax.set_ylim(-0.7, len(cells) - 0.4)
        low, high = ax.get_xlim()
        reach = 1.5 * 100 * (margin or 0.01)
        ax.set_xlim(min(low, -reach), max(high, reach))
        ax.set_xlabel("difference from the base in percent")
        quiet(ax, "x")
        return svg(fig, "Merged against base with 90 % intervals, before the margin")


def _interval(ax: "Axes", row: float, low: float | None, high: float | None, *, color: str, lw: float) -> None:
    low, high = drawable(low), drawable(high)
    if low is not None and high is not None:
        ax.plot([100 * (low - 1), 100 * (high - 1)], [row, row], color=color, lw=lw)


def overheads(bench: BenchmarkResult) -> str | None:
    """What every arm but merged costs, in percent of the base, with 90 % intervals."""
    bars = list(_bars(bench.cells))[::-1]
    if not bars:
        return None
    with figure(0.3 * len(bars) + 0.9) as fig:
        ax = fig.subplots()
        for row, (_, name, ratio, low, high) in enumerate(bars):
            ax.barh(row, 100 * (ratio - 1), height=0.6, color=_COLOURS.get(name, OTHER), alpha=0.6)
            _interval(ax, row, low, high, color=INK, lw=1.2)
        ax.axvline(0, color=MUTED, lw=0.8)
        ax.set_yticks(range(len(bars)), [f"{one_line(name)} · {cell_name(c)}" for c, name, *_ in bars])
        ax.set_xlabel("slower than the base by, in percent")
        quiet(ax, "x")
        return svg(fig, "What the other arms cost, against the base")


def _bars(cells: Sequence[Cell]) -> Iterator[tuple[Cell, str, float, float | None, float | None]]:
    """(cell, arm, ratio, low, high) of every arm but the base, merged and a base that was held up."""
    for cell in cells:
        arms = {name: (arm.ratio, arm.ci_low, arm.ci_high) for name, arm in cell.arms.items()}
        if not arms:  # a report from before there were others
            arms = {"unmerged": (cell.unmerged_ratio, cell.unmerged_ci_low, cell.unmerged_ci_high)}
        for name, (ratio, low, high) in arms.items():
            drawn = drawable(ratio)
            if name not in ("base", "merged", "delayed") and drawn is not None:
                yield cell, name, drawn, low, high
