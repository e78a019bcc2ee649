"""A picture of an adapter: where its change is, and how many directions it has. SVG, or a page around it."""

import sys
from collections.abc import Sequence
from pathlib import Path

from lora_export.contracts import Understanding
from lora_export.escape import one_line
from lora_export.report.drawing import INK, MERGED, MUTED, figure, quiet, svg
from lora_export.report.page import rendered
from lora_export.report.plots import HeatMap, layered
from lora_export.wording import percent

TYPES_HEAD = ("Module", "Weights", "Share of ‖ΔW‖²", "‖ΔW‖", "‖ΔW‖/‖W‖", "Effective rank", "Rank for 99 %")
RANKS_HEAD = ("Rank", "Keeps of ‖ΔW‖²", "Loses of ‖ΔW‖", "Numbers left")


def heat_map(figures: Understanding) -> str | None:
    """By layer and module the size of the change, relative to the weight if known, and its effective rank."""
    modules = figures.modules
    size = HeatMap([(m.name, m.relative) for m in modules], "‖ΔW‖ / ‖W‖, %", 100.0)
    if all(m.relative is None for m in modules):
        size = HeatMap([(m.name, m.norm) for m in modules], "‖ΔW‖")
    ranks = HeatMap([(m.name, m.effective_rank) for m in modules], "effective rank")
    return layered([size, ranks], "The adapter's change by layer and module")


def energy(figures: Understanding) -> str | None:
    """Share of ‖ΔW‖² by rank: the middle half of the modules and all of them."""
    import numpy as np

    curves = [m.energy for m in figures.modules if m.rank and m.finite]
    if not curves:
        return None
    most = max(map(len, curves))
    grid = 100 * np.array([[*c, *[1.0] * (most - len(c))] for c in curves])
    ranks = np.arange(1, most + 1)
    with figure(2.2) as fig:
        ax = fig.subplots()
        ax.fill_between(ranks, grid.min(0), grid.max(0), color=MUTED, alpha=0.25, linewidth=0, label="all modules")
        low, middle, high = np.percentile(grid, [25, 50, 75], axis=0)
        ax.fill_between(ranks, low, high, color=MERGED, alpha=0.4, linewidth=0, label="the middle half")
        ax.plot(ranks, middle, color=MERGED, marker="o", markersize=3, label="median")
        ax.axhline(99, color=INK, lw=0.6, ls=":")
        ax.set(xlabel="rank", ylim=(0, 102))
        ax.locator_params(axis="x", integer=True)
        ax.set_ylabel("% of ‖ΔW‖² kept")
        legend = ax.legend(frameon=False, fontsize=8, loc="lower right")
        for text in legend.get_texts():
            text.set_color(MUTED)
        quiet(ax, "y")
        return svg(fig, "How much of the change each rank keeps")


def type_rows(figures: Understanding) -> list[Sequence[str]]:
    rows = sorted(figures.by_type.items(), key=lambda item: -item[1].share)
    return [
        (
            one_line(name), str(t.modules), percent(t.share, 1), f"{t.norm:.4g}", percent(t.relative),
            f"{t.effective_rank:.1f}", f"{t.enough:g}",
        )
        for name, t in rows
    ]  # fmt: skip


def rank_rows(figures: Understanding) -> list[Sequence[str]]:
    return [
        (
            str(t.rank), percent(t.energy_kept), percent(max(0.0, 1 - t.energy_kept) ** 0.5, 1),
            percent(t.parameters, 0),
        )
        for t in figures.truncation
    ]  # fmt: skip


def skipped(figures: Understanding) -> list[str]:
    return [f"{one_line(name)}: {one_line(why)}" for name, why in figures.skipped.items()]


def picture(figures: Understanding, path: Path) -> str:
    """The text of a picture file by its ending: .svg the heat map alone, .html a page with everything."""
    from markupsafe import Markup

    heat, curve = heat_map(figures), energy(figures)
    if path.suffix == ".svg":
        return _standing_alone(heat or curve or "")
    return rendered(
        "adapter.html.j2",
        figures=figures,
        page=sys.modules[__name__],
        heat=Markup(heat) if heat else None,
        energy=Markup(curve) if curve else None,
    )


def _standing_alone(drawn: str) -> str:
    """An SVG that is opened by itself has no page that gives it its colours."""
    style = "<style>svg{--ink:#1a1a1a;--muted:#666;--rule:#ccc;--arm-merged:#2a6fdb;background:#fff}</style>"
    at = drawn.index(">") + 1
    return drawn[:at] + style + drawn[at:]
