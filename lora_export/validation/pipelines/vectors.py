"""Vectors of textual inversion in a merged token embedding: each in a row of its own, beside the base's rows."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from safetensors import safe_open

from lora_export.contracts import Check, DiffusionAdapter
from lora_export.validation.reference.files import FLOATS, Stored

EMBEDDINGS = ("token_embedding.weight", "shared.weight", "embed_tokens.weight")


@dataclass
class Vectors:
    """rows: of all vectors in the adapters' files, in fp32; first: those that begin a tensor of the files; placed:
    how often each was found in an embedding."""

    rows: list[torch.Tensor] = field(default_factory=list)
    first: set[int] = field(default_factory=set)
    placed: Counter[int] = field(default_factory=Counter)

    @classmethod
    def of(cls, adapters: Sequence[DiffusionAdapter]) -> "Vectors":
        made = cls()
        for adapter in adapters:
            if adapter.vectors:
                with safe_open(adapter.path, framework="pt") as file:
                    for key in adapter.vectors:
                        value = file.get_tensor(key).float()
                        made.first.add(len(made.rows))
                        made.rows += list(value.reshape(-1, value.shape[-1]))
        return made

    def takes(self, name: str) -> bool:
        """Whether vectors may lie in this tensor."""
        return bool(self.rows) and name.endswith(EMBEDDINGS)

    def differences(self, name: str, old: Stored, new: Stored) -> Iterator[str]:
        """Rows of the merged embedding that are neither the base's nor a vector's."""
        before, after = old.read().to(FLOATS[new.dtype]), new.read()
        if after.dim() != 2 or after.shape[1] != before.shape[1] or len(after) < len(before):
            yield f"{name}: its shape is {list(new.shape)}, the base's is {list(old.shape)}"
            return
        places: dict[int, int] = {}
        changed = torch.nonzero((after[: len(before)] != before).any(1)).flatten().tolist()
        for row in [*changed, *range(len(before), len(after))]:
            alike = [i for i, vector in enumerate(self.rows) if _is(vector, after[row])]
            if alike:
                of = min(alike, key=lambda i: self.placed[i])
                self.placed[of] += 1
                places[of] = row
                if of not in self.first and places.get(of - 1) != row - 1:
                    yield f"{name}: row {row} holds a vector that belongs behind another one"
            elif row < len(before) or bool(after[row].any()):
                yield f"{name}: row {row} is neither the base's nor a vector of an adapter"

    def check(self) -> Check:
        """Each vector must have a row. After all components."""
        left = len(self.rows) - len(self.placed)
        note = f"of {len(self.rows)} vectors of textual inversion, each in a row of a token embedding"
        return Check("vectors_without_row", left, 0, left == 0, note)


def _is(vector: torch.Tensor, row: torch.Tensor) -> bool:
    return vector.shape == row.shape and torch.equal(vector.to(row.dtype), row)
