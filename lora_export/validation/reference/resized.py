"""The vocabulary that training resized, given to the unmerged model as training did it: by transformers itself."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lora_export.contracts import AdapterChoice
from lora_export.validation.reference.files import START, adapter_config, headers

_SAVED, _DELTA = ".modules_to_save", ".trainable_tokens_delta"
_WHOLE = ("", ".modules_to_save", ".token_adapter", ".base_layer", ".token_adapter.base_layer", ".original_module")


def fit_vocabulary(model: Any, adapters: Sequence[AdapterChoice]) -> None:
    """Resize embeddings and head to the rows that the adapters' tensors have; the new rows come out of those."""
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # images and sounds have none
        return
    if getattr(embedding, "weight", None) is None or embedding.weight.is_meta:
        return
    rows = next((n for adapter in adapters for n in _rows(model, adapter)), None)
    if rows is not None and rows != embedding.weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)


def saved_twice(key: str, adapters: Sequence[AdapterChoice]) -> bool:
    """Whether a tensor that PEFT has no place for is a copy of one that it has: where it saves embeddings beside
    the adapter, a saved module's weight is there under two names, and tied heads have the embedding's rows."""
    for tensors in (headers(adapter.folder) for adapter in adapters):
        if key not in tensors or not key.endswith((_DELTA, ".weight", ".bias")):
            continue
        copies = [key.replace(_SAVED, "")] if _SAVED in key else [n for n in tensors if n.endswith(_DELTA)]
        mine = tensors[key].read()
        if any(n != key and n in tensors and torch.equal(tensors[n].read(), mine) for n in copies):
            return True
    return False


def _rows(model: Any, adapter: AdapterChoice) -> Iterator[int]:
    """The number of rows, by what tells it best: whole weights, factors, the last token that was trained."""
    shapes = {key.removeprefix(START): t.shape for key, t in headers(adapter.folder).items()}
    inside, outside = model.get_input_embeddings(), model.get_output_embeddings()
    modules = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if m is inside or m is outside]
    for name, module in modules:
        if len(module.weight.shape) == 2:
            yield from (shapes[k][0] for w in _WHOLE if (k := f"{name}{w}.weight") in shapes)
    for name, module in modules:
        if f"{name}.lora_embedding_A" in shapes:
            yield shapes[f"{name}.lora_embedding_A"][1]
        if module is outside and f"{name}.lora_B.weight" in shapes:
            yield shapes[f"{name}.lora_B.weight"][0]
    last, rows = max(_tokens(adapter), default=-1), inside.weight.shape[0]
    for name, _ in modules:
        for key in (f"{name}.token_adapter.trainable_tokens_delta", f"{name}.trainable_tokens_delta"):
            if key in shapes and rows <= last < rows + shapes[key][0]:
                yield last + 1


def _tokens(adapter: AdapterChoice) -> Iterator[int]:
    config = adapter_config(adapter.folder)
    named: Any = config.get("token_indices") or config.get("trainable_token_indices") or ()
    for tokens in named.values() if isinstance(named, dict) else (named,):
        yield from (t for t in tokens if isinstance(t, int))
