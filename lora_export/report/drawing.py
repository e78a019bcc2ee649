"""How figures look: SVG for inlining, in colours that are the page's CSS variables and follow light and dark."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Stand-ins that matplotlib takes for colours; the SVG gets CSS variables in their place.
INK, MUTED, RULE, BASE, MERGED, UNMERGED, BAND, PLUGGED, PYTORCH, OTHER = (f"#{i:02d}fefe" for i in range(1, 11))
_VARIABLES = {
    INK: "--ink", MUTED: "--muted", RULE: "--rule", BAND: "--band", BASE: "--arm-base", MERGED: "--arm-merged",
    UNMERGED: "--arm-unmerged", PLUGGED: "--arm-plugged", PYTORCH: "--arm-pytorch", OTHER: "--arm-other",
}  # fmt: skip
_WIDTH = 5.5  # inches
LARGEST = 1e9  # of what is drawn: with axes up to 1e300, matplotlib cannot place its ticks


def drawable(value: float | None) -> float | None:
    """The number, or None for one that is not finite or too large to be drawn."""
    return value if value is not None and abs(value) <= LARGEST else None


@contextmanager
def figure(height: float) -> Iterator["Figure"]:
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


def quiet(ax: "Axes", grid: str) -> None:
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.tick_params(length=0, which="both")
    if grid in ("x", "y"):
        ax.grid(axis=grid, color=RULE, lw=0.6)  # type: ignore[arg-type]
        ax.set_axisbelow(True)


def svg(fig: "Figure", label: str) -> str:
    out = io.StringIO()
    fig.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
