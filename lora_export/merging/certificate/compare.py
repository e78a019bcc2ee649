"""Two certificates compared field by field: the one that is there, and the one that is computed again."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from lora_export.contracts import Findings
from lora_export.merging.certificate.document import Certificate

# Recomputed on another processor, sums differ in their last digits; fp32 sums earlier than float64 ones.
_CLOSE = {"survival": 1e-4, "delta_survival": 1e-4, "relative_delta": 1e-4, "max_ulps": 1e-6, "mean_ulps": 1e-6}

# No trace of these is in the folder; a hash is compared where the bytes are.
_UNPROVABLE = ("tool.version", "versions", "options.device", "options.max_memory", "options.allow_nonfinite")

# Checks of the right base that go by where it is, or by the adapter's model card.
_WHERE_IT_LIES = ("name", "revision", "training quantization")


def compare(findings: Findings, recorded: Certificate, again: Certificate) -> None:
    """What the certificate says against what was computed again."""
    before, after = (_comparable(c.as_json()) for c in (recorded, again))
    failures = [
        f"{place}: the certificate says {ours}, found is {theirs}"
        for place, ours, theirs in _differences(before, after)
    ]
    findings.judge("figures", "every count, figure and hash of the certificate was found again", failures)
    findings.not_checked.append(
        f"{', '.join(_UNPROVABLE)}, and the name and revision of the base: no bytes of the folder depend on them"
    )


def _comparable(document: Mapping[str, Any]) -> dict[str, Any]:
    kept = dict(document)
    del kept["versions"]
    kept["tool"] = {"name": document["tool"]["name"]}
    kept["options"] = {k: v for k, v in document["options"].items() if f"options.{k}" not in _UNPROVABLE}
    kept["base_checks"] = [c for c in document["base_checks"] if c["name"] not in _WHERE_IT_LIES]
    kept["records"] = {r["name"]: r for r in document["records"]} | {"": [r["name"] for r in document["records"]]}
    return kept


def _differences(
    before: Any, after: Any, place: str = "", key: str = "", slack: float = 0.0
) -> Iterator[tuple[str, Any, Any]]:
    """slack: how much figures may differ besides, relatively."""
    if isinstance(before, dict) and isinstance(after, dict):
        slack = _fp32_slack(after)
        for name in [*before, *(n for n in after if n not in before)]:
            inner = f"{place} {name}".strip()
            yield from _differences(before.get(name, "nothing"), after.get(name, "nothing"), inner, name, slack)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for at, pair in enumerate(zip(before, after, strict=True)):
            yield from _differences(*pair, f"{place}[{at}]", key, slack)
    elif isinstance(before, float) and isinstance(after, float) and key in _CLOSE:
        if not math.isclose(before, after, rel_tol=_CLOSE[key] + slack, abs_tol=1e-9):
            yield place, before, after
    elif type(before) is not type(after) or before != after:
        yield place, before, after


def _fp32_slack(document: Mapping[str, Any]) -> float:
    """What fp32 loses of a change that is small beside its weight: 2⁻²² of the weight, in units of the change.

    Of a tensor's record, or of a whole certificate the largest of its tensors.
    """
    records = document.get("records")
    if isinstance(records, dict):
        return max((_fp32_slack(r) for r in records.values() if isinstance(r, dict)), default=0.0)
    delta = document.get("relative_delta")
    return min(0.1, 2.0**-22 / delta) if isinstance(delta, float) and delta > 0 else 0.0
