"""What a report says: its verdicts, badges and tables, the same for HTML and Markdown."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf, isnan
from typing import Any, Literal, get_args

from lora_export.choices import Precision
from lora_export.escape import one_line
from lora_export.report import latency, proof
from lora_export.report.text import DASH, count, number, percent, size
from lora_export.report.text import seconds as in_seconds

Tone = Literal["good", "bad", "unsure", "off"]
Row = tuple[str, ...]

_CHECK_NAMES = {
    "logits_max_abs": "Largest difference of a logit",
    "logits_kl_mean": "Mean KL divergence of the next token",
    "top1_agreement": "Same most likely token",
    "top5_agreement": "Same five most likely tokens",
    "run_to_run_max_abs": "The same model run twice",
    "perplexity_unmerged": "Perplexity, unmerged",
    "perplexity_merged": "Perplexity, merged",
    "perplexity_base": "Perplexity, base",
    "greedy_agreement": "Same greedy continuation",
    "noise_floor_max_abs": "Noise floor",
    "adapter_survival": "Adapter's effect that is left",
    "graph_max_abs": "Largest difference of a logit, same weights in PyTorch",
    "graph_kl_mean": "Mean KL divergence, same weights in PyTorch",
    "padded_max_abs": "Largest difference in a padded batch, same weights in PyTorch",
    "padded_kl_mean": "Mean KL divergence in a padded batch, same weights in PyTorch",
    "weight_errors": "Tensors whose exported numbers are wrong",
}
_MODELS = {"onnx_": " (ONNX)", "loaded_": " (in its own type)"}
_OF_BASE = "base_"
_GRAPH_TONE: dict[bool | None, tuple[str, Tone]] = {
    True: ("identical", "good"),
    False: ("differs", "unsure"),
    None: ("not compared", "off"),
}
_LATENCY_TONE: dict[str, Tone] = {"equivalent": "good", "slower": "bad", "inconclusive": "unsure"}


@dataclass(frozen=True)
class Badge:
    stage: str
    text: str
    tone: Tone


@dataclass(frozen=True)
class CheckRow:
    label: str
    name: str
    value: str
    threshold: str
    passed: bool
    note: str


def badges(report: Mapping[str, Any]) -> list[Badge]:
    """One badge a gate; a stage that did not run says so instead of looking like a pass."""
    merge, validate, export, bench = (report[s] for s in ("merge", "validate", "export", "benchmark"))
    return [
        Badge("Merge", "done" if merge else "not run", "good" if merge else "off"),
        Badge("Validation", *_validation_badge(validate)),
        Badge("Export", "done" if export else "not run", "good" if export else "off"),
        *(_latency_badges(bench) if bench else [Badge("Latency", "not run", "off")]),
    ]


def _latency_badges(bench: Mapping[str, Any]) -> list[Badge]:
    words, tone = _GRAPH_TONE[bench.get("graph_identical")]
    verdict = Badge("Latency", bench["verdict"], _LATENCY_TONE.get(bench["verdict"], "unsure"))
    return [Badge("Graph", words, tone), verdict]


def _validation_badge(validate: Mapping[str, Any] | None) -> tuple[str, Tone]:
    if validate is None:
        return "not run", "off"
    return ("passed", "good") if validate["passed"] else ("failed", "bad")


def standing(report: Mapping[str, Any]) -> tuple[str, Tone]:
    """The word above all others. A measurement that found nothing out, and was all there was, is no pass."""
    if report["status"] != "passed":
        return "Failed: do not deploy this output", "bad"
    ran = [name for name in ("merge", "validate", "export", "benchmark") if report[name]]
    if ran == ["benchmark"] and report["benchmark"]["verdict"] == "inconclusive":
        return "No verdict", "unsure"
    return "Passed", "good"


def headline(report: Mapping[str, Any]) -> list[str]:
    """A paragraph: did it merge, does it compute what it should, what does it cost, what is advised."""
    validate = report["validate"]
    said = [
        _say_merge(report["merge"]),
        _say_validation(validate),
        *(say(validate) for say in (proof.deviation_sentence, proof.perplexity_sentence) if validate),
        latency.sentence(report["benchmark"])
        if report["benchmark"]
        else "Its latency was not compared with the base.",
        *((one_line(text) for text in validate.get("advice") or ()) if validate else ()),
    ]
    return [sentence for sentence in said if sentence] or ["No stage of this run left a result."]


def _say_merge(merge: Mapping[str, Any] | None) -> str:
    if merge is None:
        return ""
    used, total = merge["adapter_tensors"].get("used"), merge["adapter_tensors"].get("total")
    changed = sum(merge["tensors"].get(k) or 0 for k in ("updated", "replaced"))
    text = f"The adapter was merged: {used} of {total} adapter tensors went into {count(changed, 'weight')}"
    survival = merge.get("delta_survival")
    if survival is not None:
        kind = one_line(merge.get("dtype") or "the output type")
        text += f", and {percent(survival)} of the update survived rounding to {kind}"
    return text + "."


def _say_validation(validate: Mapping[str, Any] | None) -> str:
    if validate is None:
        return "Whether the merged model computes what the adapter was trained to compute was not checked."
    checks = validate["checks"]
    failed = [c for c in checks if not c["passed"]]
    if validate["passed"]:
        return f"It computes what the adapter was trained to compute: all {count(len(checks), 'check')} passed."
    if not checks:
        return "It is not known to compute what the adapter was trained to compute: no check was made."
    names = ", ".join(_uncapitalized(_check_label(c["name"])) for c in failed[:3]) or "see below"
    return (
        "It does not compute what the adapter was trained to compute: "
        f"{len(failed)} of {count(len(checks), 'check')} failed ({names})."
    )


# --- tables ------------------------------------------------------------------------------------------------


def check_rows(validate: Mapping[str, Any]) -> list[CheckRow]:
    return [
        CheckRow(
            label=_check_label(c["name"]),
            name=one_line(c["name"]),
            value="not a number" if c["value"] is None or isnan(c["value"]) else number(c["value"], 4),
            threshold=_threshold(c["name"], c["threshold"]),
            passed=c["passed"],
            note=one_line(c.get("note") or ""),
        )
        for c in validate["checks"]
    ]


def _uncapitalized(label: str) -> str:
    return label[:1].lower() + label[1:]


def _check_label(name: str) -> str:
    prefix, where = next(((p, w) for p, w in _MODELS.items() if name.startswith(p)), ("", ""))
    plain = name.removeprefix(prefix)
    precision = next((p for p in get_args(Precision) if prefix and plain.startswith(f"{p}_")), "")
    known = plain.removeprefix(f"{precision}_")
    of_base = bool(prefix) and known.startswith(_OF_BASE)
    known = known.removeprefix(_OF_BASE) if of_base else known
    label = _CHECK_NAMES.get(known, one_line(known).replace("_", " ").capitalize())
    label += ", base" if of_base else ""
    return label + (f" (ONNX {precision})" if precision else where)


def _threshold(name: str, value: float | None) -> str:
    if value is None:
        return DASH
    return f"{'≥' if 'agreement' in name or 'survival' in name else '≤'} {number(value, 4)}"


def merge_facts(merge: Mapping[str, Any]) -> list[Row]:
    kinds = ", ".join(f"{number(n)} {one_line(k)}" for k, n in merge["tensors"].items() if n)
    used, total = merge["adapter_tensors"].get("used"), merge["adapter_tensors"].get("total")
    return [
        ("Tensors", kinds or DASH),
        ("Adapter tensors used", f"{used} of {total}"),
        ("Base weights", one_line(merge.get("base_weights") or DASH)),
        ("Type written", one_line(merge.get("dtype") or DASH)),
        ("Update that survived rounding", percent(merge.get("delta_survival"))),
        *proof.rounding_facts(merge["records"]),
        ("Time", in_seconds(merge.get("seconds"))),
        ("Peak memory", size(merge.get("peak_rss_bytes"))),
        *(
            (f"The right base, by its {one_line(c['name'])}", one_line(f"{c['outcome']}: {c['note']}"))
            for c in merge.get("base_checks") or ()
        ),
    ]


def weakest_records(merge: Mapping[str, Any], limit: int = 8) -> list[Row]:
    """The tensors whose update lost most to rounding."""
    known = [r for r in merge["records"] if r["survival"] is not None]
    known.sort(key=lambda r: -inf if isnan(r["survival"]) else r["survival"])  # what has no order comes first
    return [
        (one_line(r["name"]), number(r["relative_delta"]), percent(r["survival"]), _joined(r.get("kinds") or ()))
        for r in known[:limit]
    ]


def export_facts(export: Mapping[str, Any]) -> list[Row]:
    return [
        ("Engine", one_line(export["engine"])),
        ("Precision", one_line(export["precision"])),
        ("Graph nodes", number(export["nodes"])),
        ("Time", in_seconds(export.get("seconds"))),
        ("Files", f"{len(export['files'])}, {size(sum(export['files'].values()))} together"),
    ]


def file_rows(export: Mapping[str, Any]) -> list[Row]:
    return [(one_line(name), size(n)) for name, n in sorted(export["files"].items())]


def sources(report: Mapping[str, Any]) -> list[Row]:
    base, adapters = report["sources"].get("base"), report["sources"].get("adapters") or []
    rows = [("Base", _source(base))] if base else []
    rows += [("Adapter", _source(a)) for a in adapters]
    options = report["options"]
    benchmark = options.get("benchmark")
    file = options.get("configured") or (benchmark.get("configured") if isinstance(benchmark, Mapping) else None)
    return [*rows, *([("Configured by", one_line(file))] if file else [])]


def _source(source: Any) -> str:
    if not isinstance(source, Mapping):
        return one_line(source)
    commit, weight = source.get("commit"), source.get("weight", 1.0)
    name = one_line(source.get("name", DASH)) + (f" @ {one_line(commit)[:12]}" if commit else "")
    return name + (f" × {weight}" if weight != 1.0 else "")


def flattened(value: Mapping[str, Any], prefix: str = "") -> list[Row]:
    """Nested settings as (dotted.name, value)."""
    rows: list[Row] = []
    for key, item in value.items():
        name = f"{prefix}{one_line(key)}"
        if isinstance(item, Mapping):
            rows += flattened(item, f"{name}.")
        elif isinstance(item, list) and item and all(isinstance(i, Mapping) for i in item):
            for n, entry in enumerate(item):
                rows += flattened(entry, f"{name}[{n}].")
        else:
            rows.append((name, _joined(item) if isinstance(item, (list, tuple)) else _plain(item)))
    return rows


def _joined(items: Iterable[Any]) -> str:
    return ", ".join(one_line(i) for i in items) or DASH


def _plain(value: Any) -> str:
    return DASH if value is None or value == "" else one_line(value)
