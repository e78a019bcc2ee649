"""Trainable tokens: trained rows of an embedding (or of the output head) REPLACE the base's rows."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_export.adapters.keys import group
from lora_export.adapters.kind import AdapterFile
from lora_export.contracts import TargetUpdate

if TYPE_CHECKING:
    import torch

NAME = "trainable tokens"
FORMULA = "W with the rows of the trained tokens replaced"
PEFT_TYPES: tuple[str, ...] = ()  # part of any type; TRAINABLE_TOKENS has nothing else

_MARKER = "trainable_tokens_delta"
_WRAPPER = ".token_adapter"


@dataclass(frozen=True)
class RowsUpdate:
    """indices: rows of the weight; values: fp32 (tokens, width), what they become (no delta, despite its name)."""

    indices: tuple[int, ...]
    values: "torch.Tensor"

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        import torch

        here = [i for i, token in enumerate(self.indices) if rows.start <= token < rows.stop]
        places = torch.tensor([self.indices[i] - rows.start for i in here], device=weight.device, dtype=torch.long)
        return weight.index_copy(0, places, self.values[here])


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each trained embedding. With tied weights PEFT trains both as one, so they stay tied."""
    updates: list[TargetUpdate] = []
    found = group(file.tensors, (_MARKER,))
    if not found and file.config.get("trainable_token_indices"):
        raise file.refuse(
            "trainable_token_indices names tokens, but the file holds no trained rows",
            expected=f"a tensor …{_MARKER}",
            next_step="save the adapter again: model.save_pretrained(DIR)",
        )
    for name, keys in found.items():
        file.refuse_weight("a replaced token row")
        updates.append(_update(file, name.removesuffix(_WRAPPER), keys[_MARKER]))
    return updates


def _update(file: AdapterFile, name: str, key: str) -> TargetUpdate:
    indices = _indices(file, name)
    count, width = file.shape(key, 2)
    if len(indices) != count:
        raise file.refuse(
            f"{count} trained rows, but the configuration names {len(indices)} tokens",
            tensor=key,
            expected="one row for each token",
        )
    if len(set(indices)) != len(indices) or min(indices, default=0) < 0:
        raise file.refuse("a token is named twice, or negative", tensor=key, expected="distinct token ids")

    def load(shape: tuple[int, ...]) -> RowsUpdate:
        return RowsUpdate(tuple(indices), file.read(key))

    tokens = tuple(indices)
    return TargetUpdate(
        f"{name}.weight", "trainable_tokens", (key,), ((None, width),), load, tied=True, tokens=tokens
    )


def _indices(file: AdapterFile, name: str) -> list[int]:
    """The token ids of a module: a list for the input embedding, or a map from module name to list."""
    config = file.config
    named: Any = config.get("token_indices") or config.get("trainable_token_indices")
    if isinstance(named, dict):
        beside = [n.removesuffix(_WRAPPER) for n in group(file.tensors, (_MARKER,))]
        known = [
            next((ids for m, ids in named.items() if f".{n}".endswith(f".{m}")), None) for n in (name, *beside)
        ]
        # A head that is tied to the embedding is saved beside it, and named nowhere: its rows are the same.
        named = known[0] or (next(filter(None, known), None) if len(named) == 1 else None)
    if not isinstance(named, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in named):
        raise file.refuse(
            "the configuration does not say which tokens these rows are",
            tensor=name,
            expected="trainable_token_indices (or token_indices) with token ids",
        )
    return named
