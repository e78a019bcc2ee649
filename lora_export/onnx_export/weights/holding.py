"""Whether an export holds what somebody says that it was made of, as far as a few of its tensors tell."""

from collections.abc import Sequence
from pathlib import Path

from lora_export.errors import InputError
from lora_export.onnx_export import records
from lora_export.onnx_export.weights.reuse import read_map
from lora_export.onnx_export.weights.source import WeightSource

LOOKED_AT = 3  # tensors of each sort that are hashed


def check_holds(folder: Path, held: WeightSource, changed: Sequence[str], unchanged: Sequence[str]) -> None:
    """InputError unless the export in `folder` was made of `held`.

    changed, unchanged: by the adapter that it should hold; the smallest of both are looked at.
    """
    record = records.read_record(folder)
    hashes = read_map(folder, record.graphs).hashes
    if hashes.keys() != held.tensors.keys():
        odd = min(hashes.keys() ^ held.tensors.keys())
        raise _other(folder, "the export and this base have different tensors", odd)
    for names in (changed, unchanged):
        for name in sorted(names, key=lambda n: held.tensors[n].nbytes)[:LOOKED_AT]:
            if held.hash(name) != hashes[name]:
                why = "the export does not hold this adapter" if names is changed else "the base is another"
                raise _other(folder, f"{why}: a tensor has another hash", name)


def _other(folder: Path, found: str, tensor: str) -> InputError:
    return InputError(
        found,
        where=folder,
        tensor=tensor,
        expected="an export of this base with the adapters of --from in it, merged with the same options",
        next_step="give the base, adapters and options of the merge that was exported",
    )
