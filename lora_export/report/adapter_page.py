"""A picture of an adapter: where its change is, and how many directions it has. SVG, or a page around it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_export.escape import one_line
from lora_export.report import plots
from lora_export.report.drawing import INK, MERGED, MUTED, figure, quiet, svg
from lora_export.report.page import environment, stylesheet

TYPES_HEAD = ("Module", "Weights", "Share of ‖ΔW‖²", "‖ΔW‖", "‖ΔW‖/‖W‖", "Effective rank", "Rank for 99 %")
RANKS_HEAD = ("Rank", "Keeps of ‖ΔW‖²", "Loses of ‖ΔW‖", "Numbers left")


def heat_map(found: Mapping[str, Any]) -> str | None:
    """By layer and module the size of the change (beside the weight, if that is known) and its effective rank."""
    modules = found["modules"]
    relative = any(m["relative"] is not None for m in modules)
    size = ("relative", "‖ΔW‖ / ‖W‖, %", 100.0) if relative else ("norm", "‖ΔW‖", 1.0)
    return plots.layered(
        modules, [size, ("effective_rank", "effective rank", 1.0)], "The adapter's change by layer and module"
    )


def energy(found: Mapping[str, Any]) -> str | None:
    """Share of ‖ΔW‖² by rank: the middle half of the modules and all of them."""
    import numpy as np

    curves = [m["energy"] for m in found["modules"] if m["rank"] and m["finite"]]
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


def type_rows(found: Mapping[str, Any]) -> list[Sequence[str]]:
    rows = sorted(found["by_type"].items(), key=lambda item: -item[1]["share"])
    return [
        (
            one_line(name), str(t["modules"]), f"{t['share']:.1%}", f"{t['norm']:.4g}",
            "–" if t["relative"] is None else f"{t['relative']:.2%}", f"{t['effective_rank']:.1f}",
            f"{t['enough']:g}",
        )
        for name, t in rows
    ]  # fmt: skip


def rank_rows(found: Mapping[str, Any]) -> list[Sequence[str]]:
    return [
        (
            str(t["rank"]), f"{t['energy_kept']:.2%}", f"{max(0.0, 1 - t['energy_kept']) ** 0.5:.1%}",
            f"{t['parameters']:.0%}",
        )
        for t in found["truncation"]
    ]  # fmt: skip


def picture(found: Mapping[str, Any], path: Path) -> str:
    """The text of a picture file by its ending: .svg the heat map alone, .html a page with everything."""
    from markupsafe import Markup

    drawn = heat_map(found)
    if path.suffix == ".svg":
        return _standing_alone(drawn or energy(found) or "")
    curve = energy(found)
    template = environment().get_template("adapter.html.j2")
    page = template.render(
        css=stylesheet(),
        title=one_line(found["adapter"]),
        sentences=[one_line(s) for s in found["sentences"]],
        warnings=[one_line(w) for w in found["warnings"]],
        skipped=[f"{one_line(k)}: {one_line(v)}" for k, v in found["skipped"].items()],
        heat=Markup(drawn) if drawn else None,
        energy=Markup(curve) if curve else None,
        types_head=TYPES_HEAD,
        types=type_rows(found),
        ranks_head=RANKS_HEAD,
        ranks=rank_rows(found),
    )
    return page.lstrip() + "\n"


def _standing_alone(drawn: str) -> str:
    """An SVG that is opened by itself has no page that gives it its colours."""
    style = "<style>svg{--ink:#1a1a1a;--muted:#666;--rule:#ccc;--arm-merged:#2a6fdb;background:#fff}</style>"
    at = drawn.index(">") + 1
    return drawn[:at] + style + drawn[at:]
