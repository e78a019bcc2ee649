"""The HTML page: one file, no script, nothing loaded from anywhere."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.contracts import Report, Samples
from lora_export.escape import one_line, printable
from lora_export.report import budget, latency, latency_plots, pictures, plots, story

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_TEMPLATES = Path(__file__).parent / "templates"
_MOST_LINES = 50  # of warnings, notes, differences


def html(report: Report, samples: Samples, images: Mapping[str, str], comparison: Sequence[story.Row] = ()) -> str:
    """The whole page; the template escapes every string of the report. images: data URIs by the name of a file."""
    from markupsafe import Markup

    return rendered(
        "report.html.j2",
        report=report,
        comparison=comparison,
        story=story,
        latency=latency,
        budget=budget,
        pictures=pictures,
        images=images,
        plots={name: Markup(drawn) if drawn else None for name, drawn in _plots(report, samples).items()},
    )


def rendered(template: str, **context: object) -> str:
    """A page of a template, in which every string is escaped, and no name may be missing."""
    return _environment().get_template(template).render(css=_stylesheet(), **context).lstrip() + "\n"


@cache
def _environment() -> "Environment":
    """One for all pages of a process, which keeps its templates compiled."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"one_line": one_line, "printable": printable, "lines": _lines}
    return environment


def _stylesheet() -> "Markup":
    from markupsafe import Markup

    return Markup((_TEMPLATES / "report.css").read_text(encoding="utf-8"))


def _plots(report: Report, samples: Samples) -> dict[str, str | None]:
    merge, validate, bench = report.merge, report.validate, report.benchmark
    return {
        "layers": plots.layers(merge.records) if merge else None,
        "kl": plots.kl_by_position(validate.kl_by_position) if validate else None,
        "errors": pictures.errors(validate) if validate else None,
        "frontier": budget.frontier(report.budget) if report.budget else None,
        "forest": latency_plots.forest(bench) if bench else None,
        "overheads": latency_plots.overheads(bench) if bench else None,
        "latency": latency_plots.latency(bench, samples) if bench else None,
    }


def _lines(texts: Sequence[str]) -> list[str]:
    more = [f"and {len(texts) - _MOST_LINES:,} more"] if len(texts) > _MOST_LINES else []
    return [*map(one_line, texts[:_MOST_LINES]), *more]
