"""Figures as SVG for inlining. Colours are the page's CSS variables, so they follow its light or dark scheme."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_export.report.story import cell_key, cell_name, margin_of
from lora_export.report.text import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Stand-ins that matplotlib takes for colours, and the CSS variables that the SVG gets instead.
INK, MUTED, RULE, BASE, MERGED, UNMERGED, BAND = (f"#0{i}fefe" for i in range(1, 8))
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    RULE: "--rule",
    BASE: "--arm-base",
    MERGED: "--arm-merged",
    UNMERGED: "--arm-unmerged",
    BAND: "--band",
}
_ARMS = (("base", BASE), ("merged", MERGED), ("unmerged", UNMERGED))
_WIDTH = 5.5  # inches
_MAX_TICKS = 150
_MAX_MODULES = 24


def latency(bench: Mapping[str, Any], samples: Mapping[str, Mapping[str, Sequence[float]]]) -> str | None:
    """For each cell and arm: raw samples as ticks, the middle half as a bar, the median as a dot."""
    cells = [c for c in bench["cells"] if any((samples.get(cell_key(c)) or {}).values())]
    if not cells:
        return None
    arms = [sum(bool(samples[cell_key(c)].get(name)) for name, _ in _ARMS) for c in cells]
    with _figure(0.55 * len(cells) + 0.24 * sum(arms) + 0.5) as fig:
        axes = fig.subplots(len(cells), 1, squeeze=False, gridspec_kw={"height_ratios": arms})[:, 0]
        for ax, cell in zip(axes, cells, strict=True):
            _strips(ax, _pooled(samples[cell_key(cell)]))
            ax.set_title(cell_name(cell), loc="left", fontsize=9, color=INK)
        axes[-1].set_xlabel("milliseconds")
        return _svg(fig, "Latency of every arm in each cell")


def _pooled(arms: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    """Both sessions of the base as one arm, which is how its median was taken."""
    return {**arms, "base": [*arms.get("base", ()), *arms.get("base_again", ())]}


def _strips(ax: "Axes", arms: Mapping[str, Sequence[float]]) -> None:
    present = [(name, colour) for name, colour in _ARMS if arms.get(name)]
    everything = np.concatenate([np.asarray(arms[name], float) for name, _ in present])
    low, high = np.quantile(everything, [0.0, 0.97])
    for row, (name, colour) in enumerate(reversed(present)):
        times = np.asarray(arms[name], float)
        shown = times[np.linspace(0, len(times) - 1, min(len(times), _MAX_TICKS)).astype(int)]
        shown = shown[shown <= high]
        q1, median, q3 = np.quantile(times, [0.25, 0.5, 0.75])
        # One broken line is one SVG path, however many ticks it has.
        x = np.repeat(shown, 3)
        y = np.tile([row - 0.3, row + 0.3, np.nan], len(shown))
        ax.plot(x, y, color=colour, lw=0.6, alpha=0.4)
        ax.plot([q1, q3], [row, row], color=colour, lw=5, alpha=0.55, solid_capstyle="butt")
        ax.plot(median, row, "o", color=colour, ms=6, markeredgecolor=INK, markeredgewidth=0.6)
    ax.set_yticks(range(len(present)), [name for name, _ in reversed(present)])
    ax.set_ylim(-0.6, len(present) - 0.4)
    margin = (high - low) * 0.05 or max(high * 0.05, 1e-3)
    ax.set_xlim(low - margin, high + margin)
    _quiet(ax, "x")


def forest(bench: Mapping[str, Any]) -> str | None:
    """Difference from the base in percent with its 90 % interval, before the band of the margin."""
    cells = [c for c in bench["cells"] if c["ratio"] is not None]
    if not cells:
        return None
    with _figure(0.42 * len(cells) + 1.0) as fig:
        ax = fig.subplots()
        margin = margin_of(bench)
        if margin:
            ax.axvspan(100 * (1 / (1 + margin) - 1), 100 * margin, color=BAND, lw=0)
        ax.axvline(0, color=MUTED, lw=0.8)
        for row, cell in enumerate(reversed(cells)):
            _interval(ax, row, cell, "", MERGED)
            _interval(ax, row - 0.22, cell, "unmerged_", UNMERGED)
        ax.set_yticks(range(len(cells)), [cell_name(c) for c in reversed(cells)])
        ax.set_ylim(-0.7, len(cells) - 0.4)
        _not_thinner_than(ax, 1.5 * 100 * (margin or 0.01))
        ax.set_xlabel("difference from the base in percent")
        _quiet(ax, "x")
        return _svg(fig, "Ratio of merged and unmerged to base with 90 % intervals")


def _interval(ax: "Axes", row: float, cell: Mapping[str, Any], prefix: str, colour: str) -> None:
    ratio = cell[f"{prefix}ratio"]
    if ratio is None:
        return
    low, high = cell[f"{prefix}ci_low"], cell[f"{prefix}ci_high"]
    if low is not None and high is not None:
        ax.plot([100 * (low - 1), 100 * (high - 1)], [row, row], color=colour, lw=2)
    ax.plot(100 * (ratio - 1), row, "o", color=colour, ms=5.5, markeredgewidth=0)


def _not_thinner_than(ax: "Axes", reach: float) -> None:
    low, high = ax.get_xlim()
    ax.set_xlim(min(low, -reach), max(high, reach))


def kl_by_position(values: Sequence[float]) -> str | None:
    """KL divergence of the next token at each position, on a logarithmic scale."""
    known = np.array([np.nan if v is None or v <= 0 else v for v in values], float)
    if not np.isfinite(known).any():
        return None
    with _figure(2.1) as fig:
        ax = fig.subplots()
        ax.semilogy(np.arange(len(known)), known, color=MERGED, lw=1.2)
        if len(known) == 1:
            ax.plot(0, known[0], "o", color=MERGED)
        # matplotlib's own label of a power of ten is mathtext, which is switched off here.
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
        ax.set_xlabel("position in the text")
        ax.set_ylabel("KL, nats")
        _quiet(ax, "y")
        return _svg(fig, "KL divergence between merged and unmerged by position")


def layers(records: Sequence[Mapping[str, Any]]) -> str | None:
    """Relative size of the update by layer and module, and below it what of the update survived rounding."""
    deltas, survivals = by_layer(records, "relative_delta"), by_layer(records, "survival")
    if not deltas:
        return None
    modules = sorted({module for _, module in deltas})[:_MAX_MODULES]
    count = max(layer for layer, _ in deltas) + 1
    fields = [(deltas, "‖ΔW‖ / ‖W‖, %", None), (survivals, "survived, %", 100.0)][: 2 if survivals else 1]
    with _figure((0.24 * len(modules) + 0.35) * len(fields) + 0.6) as fig:
        axes = fig.subplots(len(fields), 1, squeeze=False, sharex=True)[:, 0]
        for ax, (values, label, top) in zip(axes, fields, strict=True):
            _heat(fig, ax, _grid(values, modules, count), modules, label, top)
        axes[-1].set_xlabel("layer")
        axes[-1].set_xlim(-0.5, count - 0.5)
        axes[-1].xaxis.get_major_locator().set_params(integer=True)
        return _svg(fig, "Relative size of the update and its survival by layer and module")


def _grid(values: Mapping[tuple[int, str], float], modules: list[str], count: int) -> "np.ndarray[Any, Any]":
    """In percent, modules × layers; NaN where there is nothing."""
    grid = np.full((len(modules), count), np.nan)
    for (layer, module), value in values.items():
        if module in modules:
            grid[modules.index(module), layer] = 100 * value
    return grid


def by_layer(records: Sequence[Mapping[str, Any]], field: str) -> dict[tuple[int, str], float]:
    """(layer, module) → mean of the field; experts of one layer are taken together."""
    found: dict[tuple[int, str], list[float]] = {}
    for record in records:
        match = re.search(r"\.(\d{1,4})\.", record["name"])
        if match and record[field] is not None:
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
    _quiet(ax, "")


# --- style -------------------------------------------------------------------------------------------------


@contextmanager
def _figure(height: float) -> Iterator["Figure"]:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style = matplotlib.rc_context(
        {
            "svg.fonttype": "none",  # text stays text, in the page's font
            "svg.hashsalt": "lora-export",  # the same report gives the same bytes
            "text.parse_math": False,  # a $ in a name is a $
            "axes.unicode_minus": True,
            "font.family": "sans-serif",
            "font.size": 9,
            "axes.edgecolor": RULE,
            "axes.labelcolor": MUTED,
            "axes.facecolor": "none",
            "xtick.color": MUTED,
            "ytick.color": MUTED,
            "xtick.labelcolor": MUTED,
            "ytick.labelcolor": INK,
        }
    )
    with style:
        fig = Figure(figsize=(_WIDTH, height), layout="constrained")
        FigureCanvasSVG(fig)
        yield fig


def _quiet(ax: "Axes", grid: str) -> None:
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.tick_params(length=0, which="both")
    if grid in ("x", "y"):
        ax.grid(axis=grid, color=RULE, lw=0.6)  # type: ignore[arg-type]
        ax.set_axisbelow(True)


def _svg(fig: "Figure", label: str) -> str:
    out = io.StringIO()
    fig.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
