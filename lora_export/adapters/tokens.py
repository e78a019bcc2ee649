"""Trainable tokens: trained rows of an embedding (or of the output head) REPLACE the base's rows."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.module import SAVE_AGAIN, modules
from lora_export.contracts import TargetUpdate

if TYPE_CHECKING:
    import torch

NAME = "trainable tokens"
FORMULA = "W with the rows of the trained tokens replaced"

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
    trained = modules(file, _MARKER)
    if not trained and file.config.get("trainable_token_indices"):
        raise file.refuse(
            "trainable_token_indices names tokens, but the file holds no trained rows",
            expected=f"a tensor …{_MARKER}",
            next_step=SAVE_AGAIN,
        )
    if trained:
        file.refuse_weight("a replaced token row")
    names = [module.name.removesuffix(_WRAPPER) for module in trained]
    return [_update(file, name, module.keys[_MARKER], names) for name, module in zip(names, trained, strict=True)]


def _update(file: AdapterFile, name: str, key: str, names: list[str]) -> TargetUpdate:
    tokens = _indices(file, name, names)
    count, width = file.shape(key, 2)
    if len(tokens) != count:
        raise file.refuse(
            f"{count} trained rows, but the configuration names {len(tokens)} tokens",
            tensor=key,
            expected="one row for each token",
        )
    if len(set(tokens)) != len(tokens) or min(tokens, default=0) < 0:
        raise file.refuse("a token id is repeated or negative", tensor=key, expected="distinct token ids")

    def load(shape: tuple[int, ...]) -> RowsUpdate:
        return RowsUpdate(tokens, file.read(key))

    return TargetUpdate(
        f"{name}.weight", "trainable_tokens", (key,), ((None, width),), load, tied=True, tokens=tokens
    )


def _indices(file: AdapterFile, name: str, names: list[str]) -> tuple[int, ...]:
    """The token ids of a module: a list for the input embedding, or a map from module name to list."""
    config = file.config
    ids: Any = config.get("token_indices") or config.get("trainable_token_indices")
    if isinstance(ids, dict):
        of = [next((i for m, i in ids.items() if f".{n}".endswith(f".{m}")), None) for n in (name, *names)]
        # A head that is tied to the embedding is saved beside it, and named nowhere: its rows are the same.
        ids = of[0] or (next(filter(None, of), None) if len(ids) == 1 else None)
    if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise file.refuse(
            "the configuration does not say which tokens these rows are",
            tensor=name,
            expected="trainable_token_indices (or token_indices) with token ids",
        )
    return tuple(ids)
