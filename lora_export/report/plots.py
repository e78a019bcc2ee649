"""Figures of the merge and of validation."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_export.escape import one_line
from lora_export.report.drawing import LARGEST, MERGED, drawable, figure, quiet, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_MODULES = 24


def kl_by_position(values: Sequence[float]) -> str | None:
    """KL divergence of the next token at each position, on a logarithmic scale."""
    known = np.array([np.nan if v is None or not 0 < v <= LARGEST else v for v in values], float)
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


def layers(records: Sequence[Mapping[str, Any]]) -> str | None:
    """Relative size of the update by layer and module, and below it what of the update survived rounding."""
    fields = [("relative_delta", "‖ΔW‖ / ‖W‖, %", 100.0), ("survival", "survived, %", 100.0)]
    title = "Relative size of the update and its survival by layer and module"
    return layered(records, fields, title, tops={"survival": 100.0})


def layered(
    records: Sequence[Mapping[str, Any]],
    fields: Sequence[tuple[str, str, float]],
    title: str,
    tops: Mapping[str, float] | None = None,
) -> str | None:
    """A heat map by layer and module for each field that has values. fields: (name, label, factor); tops: where the
    scale of a field ends. None if the first field has no value in any layer."""
    found = [(by_layer(records, name), label, factor, (tops or {}).get(name)) for name, label, factor in fields]
    if not found[0][0]:
        return None
    found = [one for one in found if one[0]]
    modules = sorted({module for _, module in found[0][0]})[:_MAX_MODULES]
    count = max(layer for layer, _ in found[0][0]) + 1
    with figure((0.24 * len(modules) + 0.35) * len(found) + 0.6) as fig:
        axes = fig.subplots(len(found), 1, squeeze=False, sharex=True)[:, 0]
        for ax, (values, label, factor, top) in zip(axes, found, strict=True):
            _heat(fig, ax, factor * _grid(values, modules, count), modules, label, top)
        axes[-1].set_xlabel("layer")
        axes[-1].set_xlim(-0.5, count - 0.5)
        axes[-1].xaxis.get_major_locator().set_params(integer=True)
        return svg(fig, title)


def _grid(values: Mapping[tuple[int, str], float], modules: list[str], count: int) -> "np.ndarray[Any, Any]":
    """modules × layers; NaN where there is nothing."""
    grid = np.full((len(modules), count), np.nan)
    for (layer, module), value in values.items():
        if module in modules:
            grid[modules.index(module), layer] = value
    return grid


def by_layer(records: Sequence[Mapping[str, Any]], field: str) -> dict[tuple[int, str], float]:
    """(layer, module) → mean of the field; experts of one layer are taken together."""
    found: dict[tuple[int, str], list[float]] = {}
    for record in records:
        match = re.search(r"\.(\d{1,4})\.", record["name"])
        if match and drawable(record[field]) is not None:
            module = re.sub(r"\.\d+(?=\.)", "", record["name"][match.end() :])
            module = one_line(module).removesuffix(".weight").rsplit(".", 1)[-1][:32]
            found.setdefault((int(match[1]), module), []).append(record[field])
    return {key: float(np.mean(values)) for key, values in found.items()}


def _heat(
    fig: "Figure", ax: "Axes", grid: "np.ndarray[Any, Any]", modules: list[str], label: str, top: float | None
) -> None:
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
