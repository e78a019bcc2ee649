"""The report of a fleet in short, for the summary of a job."""

from collections.abc import Iterator, Sequence

from lora_export.contracts.fleet_report import FleetReport, FleetReportRow
from lora_export.escape import markdown as escaped
from lora_export.report import fleet_story as story

_MARKS = {"good": "✅", "bad": "❌", "unsure": "⚠️", "off": "➖"}
_FAILED = 20  # rows that are named; the others are counted
_CHANGED = 10  # of a kind
_STAGES = 5  # the longest
_WORST = 5
_LONGEST = 300  # characters of a reason


def markdown(report: FleetReport) -> str:
    text, tone = story.verdict(report)
    lines = [f"# Fleet: {escaped(report.root)}", "", f"{_MARKS[tone]} **{escaped(text)}**", ""]
    lines += [escaped(" ".join(story.headline(report))), ""]
    if report.bases:
        lines += ["", *_table(story.BASES_HEAD, story.base_rows(report))]
    lines += _failed(story.not_there(report.rows))
    for title, worst in (
        ("Least of the adapter's effect kept", story.worst_survival(report.rows)),
        ("Farthest from the merged model", story.worst_kl(report.rows)),
    ):
        cells = [(r.name, r.base, story.share(r.survival), story.figure(r.kl)) for r in worst[:_WORST]]
        if cells:
            lines += ["", f"## {title}", "", *_table(("adapter", "base", "survival", "KL, nats"), cells)]
    if report.previous:
        lines += ["", f"## Changed since {escaped(report.previous.created)}", "", *_changed(report)]
    if claims := story.claims(report):
        lines += ["", "## What is claimed", ""]
        lines += [f"- {escaped(name)}: {escaped(text)}" for name, text in claims]
    if stages := story.stage_rows(report)[:_STAGES]:
        lines += ["", "## Where the time went", "", *_table(story.STAGES_HEAD, stages)]
    made = f"lora-export {escaped(report.tool_version)}, {escaped(report.created)}"
    return "\n".join([*lines, "", f"<sub>{made}. All rows: fleet.json, fleet.html.</sub>", ""])


def _failed(rows: Sequence[FleetReportRow]) -> list[str]:
    if not rows:
        return []
    cells = [(r.name, r.base, _state(r), story.reason(r)[:_LONGEST]) for r in rows[:_FAILED]]
    lines = ["", "## Not there", "", *_table(("adapter", "base", "state", "why"), cells)]
    return [*lines, "", f"and {len(rows) - _FAILED:,} more"] if len(rows) > _FAILED else lines


def _state(row: FleetReportRow) -> str:
    return f"{_MARKS[story.TONES[row.state]]} {story.WORDS[row.state]}"


def _changed(report: FleetReport) -> Iterator[str]:
    kinds = story.changed(report)
    if not kinds:
        yield "Nothing."
    for kind in kinds:
        named = ", ".join(f"{escaped(name)} ({escaped(words)})" for name, words in kind.lines[:_CHANGED])
        more = f" and {kind.total - _CHANGED:,} more" if kind.total > _CHANGED else ""
        yield f"- {kind.heading} ({kind.total:,}): {named}{more}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    body = [f"| {' | '.join(escaped(cell) for cell in row)} |" for row in rows]
    return [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |", *body]
