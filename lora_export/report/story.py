"""What a report says, the same in HTML and Markdown: its verdict and badges, and the tables of all stages but the
benchmark."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isnan
from typing import Literal

from lora_export import wording
from lora_export.contracts import (
    BenchmarkResult,
    CacheUse,
    ExportResult,
    MergeResult,
    NamedAdapter,
    NamedSource,
    Report,
    TensorRecord,
    ValidationResult,
)
from lora_export.escape import one_line
from lora_export.report import latency, pictures
from lora_export.storage.documents import as_json
from lora_export.wording import DASH, count, number, percent, size

Tone = Literal["good", "bad", "unsure", "off"]
Row = tuple[str, ...]

PERPLEXITY_HEAD = ("Model", "Perplexity", "Against the base", "Tokens")
BASES_HEAD = ("Merged into", "Perplexity", "KL from the trained model, nats")
SURVIVAL_HEAD = ("Model", "Adapter effect retained", "KL base → merged, nats", "KL merged → model, nats")
CACHE_HEAD = ("Of the base", "Found", "SHA-256", "Note")
RECORDS_HEAD = ("Tensor", "‖ΔW‖ / ‖W‖", "Survived", "Kind")

_NOT_VALIDATED = "The merged model was not checked against the unmerged one."
_TONES: Mapping[str, Tone] = {
    "Passed": "good", "passed": "good", "done": "good", "identical": "good", "equivalent": "good",
    "equivalent by structure": "good",
    "failed": "bad", "slower": "bad",
    "No verdict": "unsure", "differs": "unsure", "inconclusive": "unsure",
    "not run": "off", "not compared": "off",
}  # fmt: skip


@dataclass(frozen=True)
class Badge:
    stage: str
    text: str

    @property
    def tone(self) -> Tone:
        return _TONES[self.text]


@dataclass(frozen=True)
class CheckRow:
    label: str
    name: str
    value: str
    threshold: str
    passed: bool
    note: str


def badges(report: Report) -> list[Badge]:
    """One badge a gate; a stage that did not run says so instead of looking like a pass."""
    merge, validate, export, bench = report.merge, report.validate, report.export, report.benchmark
    return [
        Badge("Merge", "done" if merge else "not run"),
        Badge("Validation", ("passed" if validate.passed else "failed") if validate else "not run"),
        Badge("Export", "done" if export else "not run"),
        *([Badge("Graph", wording.GRAPH[bench.graph_identical])] if bench else []),
        Badge("Latency", wording.VERDICTS[bench.verdict] if bench else "not run"),
    ]


def verdict(report: Report) -> tuple[str, Tone]:
    """The overall verdict, and its colour."""
    text = wording.overall_verdict(report)
    return text, _TONES.get(text, "bad")


# --- the paragraph on top ------------------------------------------------------------------------------------


def headline(report: Report) -> list[str]:
    """Sentences: was it merged, does it compute what it should, what does it cost, what is advised."""
    validate, bench = report.validate, report.benchmark
    sentences = [
        _merge_sentence(report.merge) if report.merge else "",
        _validation_sentence(validate) if validate else _NOT_VALIDATED,
        *((_deviation_sentence(validate), _perplexity_sentence(validate)) if validate else ()),
        pictures.sentence(validate) if validate else "",
        latency.sentence(bench) if bench else "Latency was not compared with the base.",
        *(map(one_line, validate.advice) if validate else ()),
    ]
    return [sentence for sentence in sentences if sentence]


def _merge_sentence(merge: MergeResult) -> str:
    changed = sum(merge.tensors.get(k, 0) for k in ("updated", "replaced"))
    text = f"The merge used {wording.adapter_tensors(merge)} adapter tensors and changed {count(changed, 'weight')}"
    if merge.delta_survival is not None:
        text += f"; {percent(merge.delta_survival)} of the update survived rounding to {one_line(merge.dtype)}"
    return text + "."


def _validation_sentence(validate: ValidationResult) -> str:
    if not validate.checks:
        return "No check was made, so it is unknown whether it computes what the adapter was trained to compute."
    total = count(len(validate.checks), "check")
    if validate.passed:
        return f"The merged model computes what the adapter was trained to compute: all {total} passed."
    failed = [c for c in validate.checks if not c.passed]
    labels = ", ".join(_uncapitalized(one_line(wording.check_label(c.name))) for c in failed[:3])
    return (
        "The merged model does not compute what the adapter was trained to compute: "
        f"{len(failed)} of {total} failed ({labels})."
    )


def _uncapitalized(label: str) -> str:
    return label[:1].lower() + label[1:]


def _perplexity_sentence(validate: ValidationResult) -> str:
    """The figure that most people ask for first, if it was measured."""
    values = {p.model: number(p.value, 4) for p in validate.perplexities if p.value}
    if not values.keys() >= {"base", "unmerged", "merged"}:
        return ""
    return (
        f"Perplexity on the test text: {values['merged']} merged, {values['unmerged']} unmerged, "
        f"{values['base']} for the base."
    )


def _deviation_sentence(validate: ValidationResult) -> str:
    """Where a model that failed goes wrong first."""
    deviation = validate.deviation
    if deviation is None:
        return ""
    tensors = ", ".join(one_line(name) for name in deviation.tensors[:3])
    return (
        f"The first module that differs is {one_line(deviation.module)}: its output is off by "
        f"{number(deviation.value)}, and rounding explains only {number(deviation.floor)}."
        + (f" Look at {tensors}." if tensors else "")
    )


# --- validation ----------------------------------------------------------------------------------------------


def check_rows(validate: ValidationResult) -> list[CheckRow]:
    return [
        CheckRow(
            label=one_line(wording.check_label(c.name)),
            name=one_line(c.name),
            value=wording.check_value(c),
            threshold=wording.check_threshold(c),
            passed=c.passed,
            note=one_line(c.note),
        )
        for c in validate.checks
    ]


def perplexity_rows(validate: ValidationResult) -> list[Row]:
    base = next((p.value for p in validate.perplexities if p.model == "base"), None)
    return [
        (one_line(p.model), number(p.value, 4), _change(p.value, base), number(p.tokens))
        for p in validate.perplexities
    ]


def _change(value: float, base: float | None) -> str:
    return f"{100 * (value / base - 1):+.1f} %" if base and value != base else DASH


def base_rows(validate: ValidationResult) -> list[Row]:
    return [(one_line(b.base), number(b.perplexity, 4), number(b.kl_trained)) for b in validate.bases]


def survival_rows(validate: ValidationResult) -> list[Row]:
    return [
        (
            one_line(s.model),
            percent(s.share) + _within(percent(s.share_error), s.share_error),
            number(s.kl_base),
            number(s.kl_lost) + _within(number(s.kl_lost_error, 2), s.kl_lost_error),
        )
        for s in validate.adapter_survival
    ]


def _within(error: str, known: float | None) -> str:
    return "" if known is None else f" ± {error}"


# --- merge and export ----------------------------------------------------------------------------------------


def merge_facts(merge: MergeResult) -> list[Row]:
    return [
        ("Tensors", one_line(wording.tensors(merge))),
        ("Adapter tensors used", wording.adapter_tensors(merge)),
        ("Base weights", one_line(merge.base_weights)),
        ("Type written", one_line(merge.dtype)),
        ("Update that survived rounding", percent(merge.delta_survival)),
        *_rounding_facts(merge.records),
        ("Time", wording.seconds(merge.seconds)),
        ("Peak memory", size(merge.peak_rss_bytes)),
        *((f"Base check: {one_line(c.name)}", f"{c.outcome}: {one_line(c.note)}") for c in merge.base_checks),
    ]


def _rounding_facts(records: Sequence[TensorRecord]) -> list[Row]:
    """What the merge found when it recomputed elements in float64; nothing for a merge that did not."""
    judged = [(r.max_ulps, r.mean_ulps or 0.0, r) for r in records if r.max_ulps is not None and r.checked]
    if not judged:
        return []
    checked = sum(r.checked for *_, r in judged)
    mean = sum(ulps * r.checked for _, ulps, r in judged) / checked
    largest, _, worst = max(judged, key=lambda one: one[0])
    saturated = sum(r.saturated for r in records)
    return [
        (
            "Rounding error against float64",
            f"at most {number(largest)} and on average {number(mean)} units in the last place, in "
            f"{number(checked)} elements of {number(len(judged))} tensors",
        ),
        ("Largest in", one_line(worst.name)),
        *([("Saturated elements", number(saturated))] if saturated else []),
    ]


def weakest_records(merge: MergeResult, limit: int = 8) -> list[Row]:
    """The tensors whose update lost most to rounding."""
    known = [(r.survival, r) for r in merge.records if r.survival is not None]
    known.sort(key=lambda one: -inf if isnan(one[0]) else one[0])  # what has no order comes first
    return [
        (one_line(r.name), number(r.relative_delta), percent(survival), _joined(r.kinds))
        for survival, r in known[:limit]
    ]


def export_facts(export: ExportResult) -> list[Row]:
    return [
        ("Engine", one_line(export.engine)),
        ("Precision", export.precision),
        *([("Activations", f"{export.activations}, 8 bits")] if export.activations != "float" else []),
        ("Graph nodes", number(export.nodes)),
        *_calibration_facts(export),
        *([("Proof", one_line(wording.proof_in_words(export.proof)))] if export.proof else []),
        *(("Not taken", one_line(f"{t.engine}: {t.reason}")) for t in export.tried),
        ("Time", wording.seconds(export.seconds)),
        ("Files", f"{len(export.files)}, {size(sum(export.files.values()))} in total"),
    ]


def _calibration_facts(export: ExportResult) -> list[Row]:
    facts: list[Row] = [("Calibrated on", one_line(wording.calibration(export)))] if export.calibration else []
    if (how := export.quantized) is not None:
        facts.append(("Weights", one_line(wording.quantized(how))))
        facts.append(("Largest error of outputs", one_line(wording.output_error(how))))
    return facts


def file_rows(export: ExportResult) -> list[Row]:
    return [(one_line(name), size(n)) for name, n in sorted(export.files.items())]


def cache_rows(use: CacheUse) -> list[Row]:
    """What was taken from the cache and what was computed, each with its SHA-256."""
    return [
        (
            one_line(part.what),
            "from the cache" if part.taken else "computed",
            _joined(f"{name} {digest}" for name, digest in part.sha256.items()),
            one_line(part.note) or DASH,
        )
        for part in use.parts
    ]


# --- sources and options -------------------------------------------------------------------------------------


def about(report: Report) -> list[Row]:
    return [*sources(report), ("Made", one_line(report.created).replace("T", " "))]


def sources(report: Report) -> list[Row]:
    base = report.sources.base
    rows = [("Base", _source(base))] if base else []
    rows += [("Adapter", _source(a) + _times(a)) for a in report.sources.adapters]
    file = _configured(report.options)
    return [*rows, *([("Configured by", one_line(file))] if file else [])]


def _source(source: NamedSource) -> str:
    return one_line(source.name) + (f" @ {one_line(source.commit)[:12]}" if source.commit else "")


def _times(adapter: NamedAdapter) -> str:
    return f" × {adapter.weight}" if adapter.weight != 1.0 else ""


def _configured(options: Mapping[str, object]) -> object:
    """The configuration file and what it gave: a story's option, or one of its benchmark alone."""
    benchmark = options.get("benchmark")
    return options.get("configured") or (benchmark.get("configured") if isinstance(benchmark, Mapping) else None)


def machine_facts(bench: BenchmarkResult) -> list[Row]:
    machine: dict[str, object] = as_json(bench.environment)
    return flattened({k: v for k, v in machine.items() if k != "blocks"})


def flattened(value: Mapping[str, object], prefix: str = "") -> list[Row]:
    """Nested settings as (dotted.name, value)."""
    rows: list[Row] = []
    for key, item in value.items():
        name = f"{prefix}{one_line(key)}"
        if isinstance(item, Mapping):
            rows += flattened(item, f"{name}.")
        elif isinstance(item, list) and item and all(isinstance(i, Mapping) for i in item):
            for n, entry in enumerate(item):
                rows += flattened(entry, f"{name}[{n}].")
        elif isinstance(item, (list, tuple)):
            rows.append((name, _joined(item)))
        else:
            rows.append((name, DASH if item is None or item == "" else one_line(item)))
    return rows


def _joined(items: Iterable[object]) -> str:
    return ", ".join(one_line(i) for i in items) or DASH
