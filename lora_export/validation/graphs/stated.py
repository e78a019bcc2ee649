"""What quantization.json says of an export's quantized weights, beside what they are found to be."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_export.contracts import Check
from lora_export.contracts.figures import Figure
from lora_export.storage.documents import decode
from lora_export.storage.sealed import read_json
from lora_export.validation.graphs.calibrated import Sums
from lora_export.validation.graphs.weights import Quantized

NAME = "quantization.json"
# Relative. Both sides add up in fp64, and six digits are stated; a weight whose merge rounds the other way here
# moves a figure in its fifth digit.
TOLERANCE = 1e-4
_ROUNDING = 1e-6  # of the whole: an error that is only the rounding of fp32 has no digits to compare


@dataclass(frozen=True)
class _Weight:
    name: str
    file: str
    weight_error: Figure
    output_error: Figure | None = None


@dataclass(frozen=True)
class _Document:
    weights: tuple[_Weight, ...]


@dataclass
class Stated:
    """The errors that an export states, by data file and name, and those that are found, one piece at a time."""

    stated: dict[tuple[str, str], _Weight]
    _found: dict[tuple[str, str], Sums] = field(default_factory=dict)
    _unknown: set[tuple[str, str]] = field(default_factory=set)
    _missing: list[str] = field(default_factory=list)

    @classmethod
    def beside(cls, folder: Path) -> "Stated | None":
        """Of an export's folder; None for one that states nothing. InputError for a damaged file."""
        path = folder / NAME
        if not path.is_file():
            return None
        document = decode(read_json(path), _Document, "the certificate of quantization", path)
        return cls({(w.file, w.name): w for w in document.weights})

    def add(self, how: Quantized, found: Sums | None) -> None:
        """found: None for a piece without a counterpart."""
        key = next(((how.file, n) for n in how.packed if (how.file, n) in self.stated), None)
        if key is None:
            self._missing += how.packed[:1]
        elif found is None:
            self._unknown.add(key)
        else:
            self._found[key] = self._found.get(key, Sums()) + found

    def check(self, name: str) -> Check:
        """No figure may differ by more than TOLERANCE, and every quantized weight has one."""
        judged = {k: v for k, v in self._found.items() if k not in self._unknown}
        wrong = [*self._missing]
        for key, found in judged.items():
            wrong += _differing(self.stated[key], found)
        note = f"of {len(judged)} quantized weights, figures that {NAME} states and that differ by more than "
        note += f"{TOLERANCE:g} of their value" + (f"; the first: {wrong[0]}" if wrong else "")
        return Check(name, len(wrong), 0, not wrong and bool(judged), note)


def _differing(stated: _Weight, found: Sums) -> Sequence[str]:
    pairs: list[tuple[str, float | None, float, float]] = [
        ("weight", stated.weight_error, found.lost, found.weights)
    ]
    if stated.output_error is not None or found.outputs > 0:
        pairs.append(("output", stated.output_error, found.outputs_lost, found.outputs))
    wrong = []
    for what, said, lost, whole in pairs:
        error = math.sqrt(max(lost, 0.0) / whole) if whole > 0 else 0.0
        if said is None or not abs(said - error) <= TOLERANCE * error + _ROUNDING:
            wrong.append(f"{stated.name}, {what} error {said} for {error:.6g}")
    return wrong
