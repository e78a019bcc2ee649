"""Figures of the merge and of validation."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lora_export.contracts import TensorRecord
from lora_export.escape import one_line
from lora_export.report.drawing import MERGED, drawable, figure, quiet, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

_MAX_MODULES = 24


def kl_by_position(values: Sequence[float]) -> str | None:
    """KL divergence of the next token at each position, on a logarithmic scale."""
    known = np.array([v if v > 0 and drawable(v) is not None else np.nan for v in values], float)
    if not np.isfinite(known).any():
        return None
    with figure(2.1) as fig:
        ax = fig.subplots()
        ax.semilogy(np.arange(len(known)), known, color=MERGED, lw=1.2)
        if len(known) == 1:
            ax.plot(0, known[0], "o", color=MERGED)
        # matplotlib's own label of a power of ten is mathtext, which is switched off here.
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
        ax.set_xlabel("position in the text")
        ax.set_ylabel("KL, nats")
        quiet(ax, "y")
        return svg(fig, "KL divergence between merged and unmerged by position")


@dataclass(frozen=True)
class HeatMap:
    """A figure of each weight, by its name. factor: what it is multiplied with; top: where the scale ends."""

    values: Sequence[tuple[str, float | None]]
    label: str
    factor: float = 1.0
    top: float | None = None


def layers(records: Sequence[TensorRecord]) -> str | None:
    """Relative size of the update by layer and module, and below it what of the update survived rounding."""
    sizes = HeatMap([(r.name, r.relative_delta) for r in records], "‖ΔW‖ / ‖W‖, %", 100.0)
    survivals = HeatMap([(r.name, r.survival) for r in records], "survived, %", 100.0, top=100.0)
    return layered([sizes, survivals], "Relative size of the update and its survival by layer and module")


def layered(maps: Sequence[HeatMap], title: str) -> str | None:
    """Heat maps by layer and module, one below the other. None if the first has no value in any layer."""
    grouped = [(one, by_layer(one.values)) for one in maps]
    places = grouped[0][1]
    if not places:
        return None
    grouped = [(one, values) for one, values in grouped if values]
    modules = sorted({module for _, module in places})[:_MAX_MODULES]
    count = max(layer for layer, _ in places) + 1
    with figure((0.24 * len(modules) + 0.35) * len(grouped) + 0.6) as fig:
        axes = fig.subplots(len(grouped), 1, squeeze=False, sharex=True)[:, 0]
        for ax, (one, values) in zip(axes, grouped, strict=True):
            _heat(fig, ax, one.factor * _grid(values, modules, count), modules, one.label, one.top)
        axes[-1].set_xlabel("layer")
        axes[-1].set_xlim(-0.5, count - 0.5)
        axes[-1].xaxis.get_major_locator().set_params(integer=True)
        return svg(fig, title)


def _grid(values: Mapping[tuple[int, str], float], modules: list[str], count: int) -> "Array":
    """modules × layers; NaN where there is nothing."""
    grid = np.full((len(modules), count), np.nan)
    for (layer, module), value in values.items():
        if module in modules:
            grid[modules.index(module), layer] = value
    return grid


def by_layer(values: Sequence[tuple[str, float | None]]) -> dict[tuple[int, str], float]:
    """(layer, module) → mean; experts of one layer are taken together."""
    grouped: dict[tuple[int, str], list[float]] = {}
    for name, value in values:
        match, drawn = re.search(r"\.(\d{1,4})\.", name), drawable(value)
        if match and drawn is not None:
            module = re.sub(r"\.\d+(?=\.)", "", name[match.end() :])
            module = one_line(module).removesuffix(".weight").rsplit(".", 1)[-1][:32]
            grouped.setdefault((int(match[1]), module), []).append(drawn)
    return {key: float(np.mean(group)) for key, group in grouped.items()}


def _heat(fig: "Figure", ax: "Axes", grid: "Array", modules: list[str], label: str, top: float | None) -> None:
    """top: where the scale ends; if all values are near it, the scale still tells them apart."""
    edges = [np.arange(n + 1) - 0.5 for n in reversed(grid.shape)]
    bottom = None if top is None else min(float(np.nanmin(grid)), top - 1)
    mesh = ax.pcolormesh(*edges, np.ma.masked_invalid(grid), cmap="viridis", linewidth=0, vmin=bottom, vmax=top)
    ax.set_yticks(range(len(modules)), modules)
    ax.invert_yaxis()
    bar = fig.colorbar(mesh, ax=ax, pad=0.015, fraction=0.04)
    bar.outline.set_visible(False)
    bar.set_label(label, fontsize=8)
    quiet(ax, "")
