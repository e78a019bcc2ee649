"""Some weights of an export written anew, in place, for another adapter: the rest of its files stay as they are."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lora_export.contracts import Progress
from lora_export.errors import ExportError, InputError
from lora_export.onnx_export import records, weights_map
from lora_export.onnx_export.reweight import hash_all, read_map
from lora_export.onnx_export.weight_source import WeightSource
from lora_export.onnx_export.writing import Writing
from lora_export.sealed import read_json

LOOKED_AT = 3  # tensors of each sort that are hashed, to know what an export holds


class Rewriting:
    """folder: the export as it is; source: every tensor as it is to be."""

    def __init__(self, folder: Path, source: WeightSource) -> None:
        self._folder, self._source = folder, source
        self._record = records.read_record(folder)
        self.found = read_map(folder, tuple(self._record["graphs"]))
        if self.found.hashes.keys() != source.tensors.keys():
            odd = min(self.found.hashes.keys() ^ source.tensors.keys())
            raise _other(folder, "the export and this base have different tensors", odd)

    def check_holds(self, held: WeightSource, changed: Sequence[str], unchanged: Sequence[str]) -> None:
        """InputError unless the export was made of `held`, as far as a few of its tensors tell.

        changed, unchanged: by the adapter that it should hold; the smallest of both are looked at.
        """
        for names in (changed, unchanged):
            for name in sorted(names, key=lambda n: held.tensors[n].nbytes)[:LOOKED_AT]:
                if held.hash(name) != self.found.hashes[name]:
                    why = "the export does not hold this adapter" if names is changed else "the base is another"
                    raise _other(self._folder, f"{why}: a tensor has another hash", name)

    def ranges(self, names: set[str]) -> dict[str, list[tuple[int, int]]]:
        """File → (offset, length) of what is made of these tensors."""
        ranges: dict[str, list[tuple[int, int]]] = {}
        for weight in self.found.weights:
            if any(p.tensor in names for p in weight.recipe.pieces):
                ranges.setdefault(weight.file, []).append((weight.offset, weight.nbytes))
        return ranges

    @property
    def others(self) -> list[str]:
        """The files beside the data files that do not change."""
        own = {records.NAME, weights_map.NAME}
        return [p.name for p in self._folder.iterdir() if p.name not in own]

    def hashes_of(self, place: Path) -> Mapping[str, str]:
        """What the map of this export says of every tensor, or that of its spare, whose seal was checked."""
        if place == self._folder:
            return self.found.hashes
        found: Mapping[str, str] = read_json(place / weights_map.NAME)["hashes"]
        return found

    def of_one_base(self, place: Path, touched: set[str]) -> bool:
        """Whether another state of the export has the same numbers in all tensors but these."""
        others = self.hashes_of(place)
        mine = self.found.hashes
        return others.keys() == mine.keys() and all(others[n] == mine[n] for n in mine if n not in touched)

    def write(self, place: Path, names: set[str], others: Mapping[str, str], progress: Progress) -> int:
        """Fill in the ranges in `place`, then its record, and last its map. Bytes that were written.

        others: hashes of the tensors that the files in `place` were made of, which still hold for those not named.
        ExportError if the graph holds a tensor that changes in a way that no recipe says.
        """
        hashes = dict(others) | hash_all(self._source, names)
        fixed = (hashes.keys() - self.found.tensors) | {
            n for w in self.found.weights for n in w.recipe.computed_from
        }
        for name in sorted(fixed & names):
            if hashes[name] != self.found.hashes[name]:
                raise ExportError(
                    "the graph holds this tensor in a way that no recipe says, and it changes",
                    where=self._folder,
                    tensor=name,
                    expected="adapters on weights that lie in the data files",
                    next_step="export the other merged model anew",
                )
        Writing(place, self.found, self._source, progress, only=frozenset(names)).run()
        records.write_record(place, self._record)
        weights_map.write(place, replace(self.found, hashes={n: hashes[n] for n in sorted(hashes)}))
        return sum(length for ranges in self.ranges(names).values() for _, length in ranges)


def _other(folder: Path, found: str, tensor: str) -> InputError:
    return InputError(
        found,
        where=folder,
        tensor=tensor,
        expected="an export of this base with the adapters of --from in it, merged with the same options",
        next_step="give the base, adapters and options of the merge that was exported",
    )
