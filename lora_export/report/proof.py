"""What a report says of the proof: perplexities, the bases, what a precision keeps, and where it goes wrong."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_export.escape import one_line
from lora_export.report.text import DASH, number, percent

Row = tuple[str, ...]

PERPLEXITY_HEAD = ("Model", "Perplexity", "Against the base", "Tokens")
BASES_HEAD = ("Merged into", "Perplexity", "KL from the trained model, nats")
SURVIVAL_HEAD = ("Model", "Adapter's effect that is left", "KL base → merged, nats", "KL lost, nats")


def perplexity_rows(validate: Mapping[str, Any]) -> list[Row]:
    found = validate.get("perplexities") or ()
    base = next((p["value"] for p in found if p["model"] == "base"), None)
    return [
        (one_line(p["model"]), number(p["value"], 4), _change(p["value"], base), number(p["tokens"])) for p in found
    ]


def _change(value: float | None, base: float | None) -> str:
    if value is None or not base or value == base:
        return DASH
    return f"{100 * (value / base - 1):+.1f} %"


def base_rows(validate: Mapping[str, Any]) -> list[Row]:
    found = validate.get("bases") or ()
    return [(one_line(b["base"]), number(b["perplexity"], 4), number(b["kl_trained"])) for b in found]


def survival_rows(validate: Mapping[str, Any]) -> list[Row]:
    found = validate.get("adapter_survival") or ()
    return [(one_line(s["model"]), percent(s["share"]), number(s["kl_base"]), number(s["kl_lost"])) for s in found]


def perplexity_sentence(validate: Mapping[str, Any]) -> str:
    """The figure that most people ask for first, if it was measured."""
    values = {p["model"]: p["value"] for p in validate.get("perplexities") or ()}
    if not all(values.get(name) for name in ("base", "unmerged", "merged")):
        return ""
    base, unmerged, merged = (number(values[name], 4) for name in ("base", "unmerged", "merged"))
    return f"On the text its perplexity is {merged}; the unmerged model has {unmerged} and the base {base}."


def deviation_sentence(validate: Mapping[str, Any]) -> str:
    """Where a model that failed goes wrong first."""
    found = validate.get("deviation")
    if not found:
        return ""
    tensors = ", ".join(one_line(name) for name in found["tensors"][:3])
    return (
        f"It goes wrong first in {one_line(found['module'])}, whose output is off by {number(found['value'])} "
        f"where rounding explains {number(found['floor'])}" + (f": look at {tensors}." if tensors else ".")
    )


def rounding_facts(records: Sequence[Mapping[str, Any]]) -> list[Row]:
    """What the merge found when it recomputed elements in float64; nothing for a merge that did not."""
    judged = [r for r in records if r.get("max_ulps") is not None and r.get("checked")]
    if not judged:
        return []
    checked = sum(r["checked"] for r in judged)
    mean = sum((r.get("mean_ulps") or 0.0) * r["checked"] for r in judged) / checked
    worst = max(judged, key=lambda r: float(r["max_ulps"]))
    saturated = sum(r.get("saturated") or 0 for r in records)
    rows: list[Row] = [
        (
            "Rounding, against float64",
            f"at most {number(worst['max_ulps'])} and on average {number(mean)} units in the last place, in "
            f"{number(checked)} elements of {number(len(judged))} tensors",
        ),
        ("Largest in", one_line(worst["name"])),
    ]
    return [*rows, ("Saturated elements", number(saturated))] if saturated else rows
