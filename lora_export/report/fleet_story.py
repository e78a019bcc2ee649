"""What the report of a fleet says, the same in HTML and Markdown."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from lora_export.contracts.fleet import STATES, State
from lora_export.contracts.fleet_report import FleetChange, FleetReport, FleetReportRow
from lora_export.escape import one_line
from lora_export.report.fleet_plots import Point, histogram
from lora_export.wording import DASH, VERDICTS, count, number, percent, seconds, size

Tone = Literal["good", "bad", "unsure", "off"]
WORDS: Mapping[State, str] = {
    "done": "made", "skipped": "there already", "gate": "gate failed", "refused": "refused",
    "died": "died", "timeout": "out of time",
}  # fmt: skip
TONES: Mapping[State, Tone] = {
    "done": "good", "skipped": "off", "gate": "bad", "refused": "unsure", "died": "bad", "timeout": "bad",
}  # fmt: skip
THERE: tuple[State, ...] = ("done", "skipped")
WORST = 10
MOST_CHANGES = 50  # of a kind, in the pages; fleet.json has all
BASES_HEAD = (
    "Base", "Adapters", *(w.capitalize() for w in WORDS.values()), "Median survival", "Least", "Median seconds",
)  # fmt: skip
STAGES_HEAD = ("Stage", "Times", "Median", "All", "Share")
_HEADINGS: Mapping[str, str] = {
    "gone": "No longer asked for", "new": "New", "key": "Made of something else: another key",
    "state": "Another state", "survival": "The adapter's effect is kept to another share",
}  # fmt: skip


@dataclass(frozen=True)
class Changed:
    """Changes of a kind; lines: the first of them in words; more: how many are left out."""

    heading: str
    total: int
    lines: tuple[tuple[str, str], ...]
    more: int


def verdict(report: FleetReport) -> tuple[str, Tone]:
    """Whether every adapter is there, and the colour of that."""
    missing = sum(n for state, n in report.totals.items() if state not in THERE)
    absent = _absent(report.joined)
    if absent:
        said = f"{len(absent):,} of {count(len(absent) + len(report.joined), 'shard')}"
        return f"{said} left no report", "bad"
    if not report.rows:
        return "No adapters", "unsure"
    if missing:
        return (
            f"{missing:,} of {count(len(report.rows), 'adapter')} {'is' if missing == 1 else 'are'} not there",
            "bad",
        )
    return f"All {count(len(report.rows), 'adapter')} are there", "good"


def headline(report: FleetReport) -> list[str]:
    said = [f"{report.totals[state]:,} {WORDS[state]}" for state in STATES if report.totals.get(state)]
    sentences = [f"{', '.join(said)}." if said else "Nothing was asked for."]
    sentences += [f"The run took {duration(report.seconds)}."] if report.seconds else []
    found = [f"{n:,} {words}" for v, words in VERDICTS.items() if (n := sum(r.verdict == v for r in report.rows))]
    sentences += [f"Latency against the base: {', '.join(found)}."] if found else []
    if lowest := worst_survival(report.rows)[:1]:
        sentences.append(
            f"Least of an adapter's effect that is kept: {share(lowest[0].survival)} ({lowest[0].name})."
        )
    return sentences


def about(report: FleetReport) -> list[tuple[str, str]]:
    nbytes = [r.nbytes for r in report.rows if r.nbytes is not None]
    rows = [("Root", one_line(report.root)), ("Written", report.created)]
    rows += [("Shard", f"{report.shard}: only a part of the fleet")] if report.shard else []
    rows += [("Shards", _shards(report.joined))] if report.joined else []
    rows += [("Objects", f"{size(sum(nbytes))} in {count(len(nbytes), 'object')}")] if nbytes else []
    if report.previous:
        before = report.previous
        said = ", ".join(f"{n:,} {WORDS[s]}" for s in STATES if (n := before.totals.get(s)))
        rows.append(("Run before", f"{before.created}: {said or DASH}"))
    return rows


def share(value: float | None) -> str:
    return DASH if value is None else "not a number" if math.isnan(value) else percent(value)


def figure(value: float | None) -> str:
    return DASH if value is None else "not a number" if math.isnan(value) else number(value)


def _shards(joined: Sequence[str]) -> str:
    absent = _absent(joined)
    said = f"{len(joined):,} of {len(joined) + len(absent):,}"
    return said + (f"; no report of {', '.join(absent)}" if absent else "")


def _absent(joined: Sequence[str]) -> list[str]:
    """Shards whose report is missing."""
    if not joined:
        return []
    of = joined[0].partition("/")[2]
    return [shard for at in range(int(of)) if (shard := f"{at}/{of}") not in joined]


def survival(row: FleetReportRow) -> str:
    return share(row.survival)


def kl(row: FleetReportRow) -> str:
    return figure(row.kl)


def nbytes(row: FleetReportRow) -> str:
    return size(row.nbytes)


def duration(value: float) -> str:
    if not math.isfinite(value) or value < 120:
        return seconds(value)
    minutes, rest = divmod(round(value), 60)
    return f"{minutes // 60:,} h {minutes % 60:02} min" if minutes >= 120 else f"{minutes} min {rest:02} s"


def reason(row: FleetReportRow) -> str:
    """Why it is not there, in words; nothing where nobody said."""
    if row.error is None:
        return f"{row.failed} of {count(row.checks, 'check')} failed" if row.failed else ""
    parts = [row.error.get(part) for part in ("found", "where", "tensor")]
    hint = row.error.get("next")
    return "; ".join(p for p in parts if p) + (f" – try: {hint}" if hint else "")


# --- tables --------------------------------------------------------------------------------------------------


def base_rows(report: FleetReport) -> list[tuple[str, ...]]:
    found = []
    for base in report.bases:
        rows = [r for r in report.rows if r.base == base.name]
        kept = _finite(r.survival for r in rows)
        times = _finite(r.seconds for r in rows if r.seconds)
        found.append(
            (
                one_line(base.name) or DASH,
                f"{len(rows):,}",
                *(f"{n:,}" if (n := base.totals.get(state)) else DASH for state in STATES),
                share(median(kept)) if kept else DASH,
                share(min(kept)) if kept else DASH,
                number(median(times)) if times else DASH,
            )
        )
    return found


def stage_rows(report: FleetReport) -> list[tuple[str, ...]]:
    """Seconds by stage, of all rows as they were made and of what they share, the longest first."""
    times: dict[str, list[float]] = {}
    shared = [(f"{stage} (base)", s) for b in report.bases for p in b.preparations for stage, s in p.stages.items()]
    for stage, spent in (*shared, *((stage, s) for row in report.rows for stage, s in row.stages.items())):
        if math.isfinite(spent):
            times.setdefault(stage, []).append(spent)
    whole = math.fsum(t for spent in times.values() for t in spent)
    return [
        (
            one_line(stage),
            f"{len(spent):,}",
            seconds(median(spent)),
            duration(of := math.fsum(spent)),
            percent(of / whole, 1),
        )
        for stage, spent in sorted(times.items(), key=lambda item: -math.fsum(item[1]))
        if whole > 0
    ]


def claims(report: FleetReport) -> list[tuple[str, str]]:
    """What may be said of the rows that share a preparation, in the words of its record, and why others share
    none."""
    found = []
    for base in report.bases:
        for shared in base.preparations:
            said = shared.claim or (
                reason_of(shared.error) if shared.error else "nothing was measured for its graph"
            )
            key = shared.key[:12]
            found.append((base.name or key, f"{count(shared.rows, 'adapter')} of {key}: {said}"))
        rows = [r for r in report.rows if r.base == base.name and r.alone]
        for why in dict.fromkeys(r.alone for r in rows):
            found.append((base.name, f"{count(sum(r.alone == why for r in rows), 'adapter')} alone: {why}"))
    return [(one_line(name), one_line(text)) for name, text in found]


def reason_of(error: Mapping[str, str | None]) -> str:
    return "; ".join(p for part in ("found", "where") if (p := error.get(part)))


def not_there(rows: Sequence[FleetReportRow]) -> list[FleetReportRow]:
    """Rows without an object, what a person has to act on first: those that stopped, then gates."""
    order: tuple[State, ...] = ("died", "timeout", "refused", "gate")
    return sorted((r for r in rows if r.state not in THERE), key=lambda r: order.index(r.state))


def worst_survival(rows: Sequence[FleetReportRow]) -> list[FleetReportRow]:
    """Rows with a figure, the lowest first; what is no number is worse than any."""
    return _ordered(rows, lambda r: r.survival, 1.0)


def worst_kl(rows: Sequence[FleetReportRow]) -> list[FleetReportRow]:
    return _ordered(rows, lambda r: r.kl, -1.0)


def _ordered(
    rows: Sequence[FleetReportRow], of: Callable[[FleetReportRow], float | None], sign: float
) -> list[FleetReportRow]:
    known = [(value, row) for row in rows if (value := of(row)) is not None]
    return [row for _, row in sorted(known, key=lambda p: -math.inf if math.isnan(p[0]) else sign * p[0])][:WORST]


def _finite(values: Iterable[float | None]) -> list[float]:
    return [v for v in values if v is not None and math.isfinite(v)]


# --- changes -------------------------------------------------------------------------------------------------


def changed(report: FleetReport) -> list[Changed]:
    found = []
    for what, heading in _HEADINGS.items():
        of_kind = [c for c in report.changes if c.what == what]
        if of_kind:
            lines = tuple((c.name, _words(c)) for c in of_kind[:MOST_CHANGES])
            found.append(Changed(heading, len(of_kind), lines, len(of_kind) - len(lines)))
    return found


def _words(change: FleetChange) -> str:
    if change.what == "key":
        return f"{change.before[:12] or DASH} → {change.after[:12] or DASH}"
    if change.what == "survival":
        return f"{share(float(change.before))} → {share(float(change.after))}"
    before, after = (WORDS.get(s, s) for s in (change.before, change.after))  # type: ignore[call-overload]
    return " → ".join(w for w in (before, after) if w)


# --- plots ---------------------------------------------------------------------------------------------------


def plots(report: FleetReport) -> list[tuple[str, str]]:
    """Distributions as SVG with a caption, of the figures that there are."""
    drawn = []
    for label, of, words in _DRAWN:
        points = [Point(of(row), row.state not in THERE) for row in report.rows]
        svg = histogram(points, label, words)
        if svg is not None:
            odd = sum(p.value is not None and not math.isfinite(p.value) for p in points)
            drawn.append((svg, label + (f"; {odd:,} not a number, not drawn" if odd else "")))
    return drawn


_DRAWN: tuple[tuple[str, Callable[[FleetReportRow], float | None], Callable[[float], str]], ...] = (
    ("Share of the adapter's effect that is kept", lambda r: r.survival, lambda v: f"{100 * v:.4g}%"),
    ("KL divergence of the export from the merged model, nats", lambda r: r.kl, number),
    ("Seconds for an adapter", lambda r: r.seconds or None, number),
    ("Size of an object", lambda r: r.nbytes, lambda v: size(v).replace(".00", "")),
)
