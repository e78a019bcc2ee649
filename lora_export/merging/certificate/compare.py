"""Two certificates compared field by field: the one that was found, and the one that is computed again."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from lora_export.contracts import Finding, MergeOptions, Verification
from lora_export.errors import InputError, plain
from lora_export.merging.certificate.document import (
    NAME,
    SCHEMA_VERSION,
)
from lora_export.storage import documents
from lora_export.storage.documents import FIGURE, Kind
from lora_export.storage.sealed import read_sealed

_RECORD: Kind = {
    "name": str, "operation": str, "dtype": str, "shape": [int], "kinds": [str], "checked": int, "saturated": int,
    **dict.fromkeys(("relative_delta", "survival", "max_ulps", "mean_ulps"), (None, FIGURE)),
    **dict.fromkeys(("hash_in", "hash_out"), (None, str)),
}  # fmt: skip

_FILE: Kind = ({"size": int, "sha256": str}, {"size": int, "header_sha256": str})

_CERTIFICATE: Kind = {
    "schema_version": int, "tool": {"name": str, "version": str}, "versions": {str: str}, "options": dict,
    "base": {"files": {str: {"size": int}}}, "tensors": {str: int}, "unchecked": {str: str}, "records": [_RECORD],
    "adapters": [{"kind": str, "weight": float, "base_model": (None, str), "sha256": {str: str}}],
    "adapter_tensors": {"used": int, "total": int}, "delta_survival": (None, FIGURE), "files": {str: _FILE},
    "base_checks": [{"name": str, "outcome": str, "note": str}],
}  # fmt: skip

# Recomputed on another processor, sums differ in their last digits; fp32 sums earlier than float64 ones.
_CLOSE = {"survival": 1e-4, "delta_survival": 1e-4, "relative_delta": 1e-4, "max_ulps": 1e-6, "mean_ulps": 1e-6}

# No trace of these is in the folder; a hash is compared where the bytes are.
_UNPROVABLE = ("tool.version", "versions", "options.device", "options.max_memory", "options.allow_nonfinite")

# Checks of the right base that go by where it is, or by the adapter's model card.
_WHERE_IT_LIES = ("name", "revision", "training quantization")


@dataclass
class Findings:
    """What was checked. A name that nothing failed under is a check that passed."""

    done: list[Finding] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)

    def judge(self, name: str, passed: str, failures: Iterator[str] | Sequence[str]) -> None:
        found = [Finding(name, False, plain(note)) for note in failures]
        self.done += found or [Finding(name, True, plain(passed))]

    def fail(self, name: str, note: str) -> None:
        self.done.append(Finding(name, False, plain(note)))

    def result(self) -> Verification:
        return Verification(tuple(self.done), tuple(self.not_checked))


def read_certificate(folder: Path) -> dict[str, Any]:
    """The certificate of a folder, its seal and kinds checked. InputError says what is wrong with it."""
    recorded = read_sealed(folder / NAME)
    version = recorded.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InputError(
            f"the certificate has schema version {version!r}",
            where=folder / NAME,
            expected=f"version {SCHEMA_VERSION}",
            next_step="verify with the lora-export that wrote it",
        )
    documents.check(recorded, _CERTIFICATE, "the certificate", folder / NAME)
    _options(recorded["options"], folder / NAME)
    return recorded


def recorded_options(recorded: Mapping[str, Any], folder: Path) -> MergeOptions:
    """The options of the merge that a certificate is of."""
    return _options(recorded["options"], folder / NAME)


def _options(recorded: Mapping[str, Any], where: Path) -> MergeOptions:
    hints = get_type_hints(MergeOptions)
    names = {f.name for f in fields(MergeOptions)} - {"force"}
    if set(recorded) != names:
        raise InputError("the options are not those of a merge", where=where, expected=", ".join(sorted(names)))
    for name, value in recorded.items():
        choices = get_args(hints[name])
        kinds = choices or (hints[name],)
        good = value in choices if choices and isinstance(choices[0], str) else type(value) in kinds
        if not good:
            raise InputError(f"the option {name} is {value!r}", where=where)
    return MergeOptions(**recorded)


def compare(findings: Findings, recorded: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """What the certificate says against what was computed again."""
    recorded, found = (_comparable(d) for d in (recorded, found))
    failures = [
        f"{place}: the certificate says {said}, found is {is_}"
        for place, said, is_ in _differences(recorded, found)
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
    said: Any, found: Any, place: str = "", key: str = "", slack: float = 0.0
) -> Iterator[tuple[str, Any, Any]]:
    """slack: how much figures may differ besides, relatively."""
    if isinstance(said, dict) and isinstance(found, dict):
        slack = _fp32_slack(found)
        for name in [*said, *(n for n in found if n not in said)]:
            inner = f"{place} {name}".strip()
            yield from _differences(said.get(name, "nothing"), found.get(name, "nothing"), inner, name, slack)
    elif isinstance(said, list) and isinstance(found, list) and len(said) == len(found):
        for at, pair in enumerate(zip(said, found, strict=True)):
            yield from _differences(*pair, f"{place}[{at}]", key, slack)
    elif isinstance(said, float) and isinstance(found, float) and key in _CLOSE:
        if not math.isclose(said, found, rel_tol=_CLOSE[key] + slack, abs_tol=1e-9):
            yield place, said, found
    elif type(said) is not type(found) or said != found:
        yield place, said, found


def _fp32_slack(document: Mapping[str, Any]) -> float:
    """What fp32 loses of a change that is small beside its weight: 2⁻²² of the weight, in units of the change.

    Of a tensor's record, or of a whole certificate the largest of its tensors.
    """
    records = document.get("records")
    if isinstance(records, dict):
        return max((_fp32_slack(r) for r in records.values() if isinstance(r, dict)), default=0.0)
    delta = document.get("relative_delta")
    return min(0.1, 2.0**-22 / delta) if isinstance(delta, float) and delta > 0 else 0.0
