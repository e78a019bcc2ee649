"""Which weights got more bits, and what that cost and kept: the table and the figure of a search."""

import math
from collections.abc import Sequence

from lora_export.contracts import BudgetSearch, BudgetStep
from lora_export.report.drawing import BASE, MERGED, MUTED, drawable, figure, quiet, svg
from lora_export.wording import DASH, number, percent, size

Row = tuple[str, ...]
HEAD = ("Size", "In int8", "Unquantized", "Adapter effect retained", "KL lost, nats", "Perplexity", "")


def sentence(search: BudgetSearch) -> str:
    """What was asked for, and what was found."""
    wanted = []
    if search.min_survival is not None:
        wanted.append(f"at least {percent(search.min_survival)} of the adapter's effect")
    if search.max_size is not None:
        wanted.append(f"at most {size(search.max_size)}")
    taken = next(step for step in search.steps if step.chosen)
    made = (
        f"{len(search.steps)} exports were made and measured" if len(search.steps) > 1 else "the first export did"
    )
    more = f", with more bits for {taken.in_int8 + taken.unquantized} of {search.groups} groups of weights"
    return (
        f"Asked for: {' in '.join(wanted)}. Taken: {size(taken.nbytes)}, which keep {_share(taken)}"
        f"{more if search.groups else ''}; {made}."
    )


def rows(search: BudgetSearch) -> list[Row]:
    return [
        (
            size(step.nbytes),
            number(step.in_int8),
            number(step.unquantized),
            _share(step),
            number(step.kl_lost),
            number(step.perplexity, 4),
            "taken" if step.chosen else "",
        )
        for step in search.steps
    ]


def _share(step: BudgetStep) -> str:
    if step.share is None:
        return DASH
    return percent(step.share) + ("" if math.isnan(step.uncertainty) else f" ± {percent(step.uncertainty)}")


def frontier(search: BudgetSearch) -> str | None:
    """Size against the share that is kept, and against the perplexity where there is one. None for a single export:
    there is nothing to compare it with."""
    steps = [s for s in search.steps if drawable(s.share) is not None]
    if len(steps) < 2:
        return None
    predicts = [s for s in steps if drawable(s.perplexity) is not None]
    with figure(3.6 if predicts else 2.2) as fig:
        axes = fig.subplots(2 if predicts else 1, 1, squeeze=False, sharex=True)[:, 0]
        shares = [100 * (s.share or 0.0) for s in steps]
        errors = [0.0 if math.isnan(s.uncertainty) else 100 * s.uncertainty for s in steps]
        axes[0].errorbar(
            _sizes(steps), shares, errors, color=MERGED, ecolor=MUTED, lw=1.2, marker=".", elinewidth=0.8
        )
        axes[0].set_ylabel("effect kept, %")
        if search.min_survival is not None:
            axes[0].axhline(100 * search.min_survival, color=BASE, lw=0.8, ls="--")
        if predicts:
            axes[1].plot(
                _sizes(predicts), [s.perplexity or 0.0 for s in predicts], color=MERGED, lw=1.2, marker="."
            )
            axes[1].set_ylabel("perplexity")
        for ax, known, of in zip(axes, (steps, predicts), ("share", "perplexity"), strict=False):
            for taken in (s for s in known if s.chosen):
                value = 100 * (taken.share or 0.0) if of == "share" else taken.perplexity or 0.0
                ax.plot(taken.nbytes / 1e6, value, "o", color=MERGED, ms=7)
            if search.max_size is not None:
                ax.axvline(search.max_size / 1e6, color=BASE, lw=0.8, ls="--")
            quiet(ax, "y")
        axes[-1].set_xlabel("size of graph and data files, MB")
        return svg(fig, "Size of the export against what it keeps of the adapter")


def _sizes(steps: Sequence[BudgetStep]) -> list[float]:
    return [s.nbytes / 1e6 for s in steps]
