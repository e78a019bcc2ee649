"""The recipes of parameters that transformers joins of several tensors while it loads a model, such as experts.

A checkpoint has a matrix for each expert, transformers one parameter for all. What it does to the matrices is done
to the numbers of their lines instead, and their order in the result is the recipe. No weight is read.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from lora_export.onnx_export.weights.map import Piece, Recipe


@contextlib.contextmanager
def intercepted() -> Iterator[dict[str, Recipe]]:
    """Inside, parameters that are lines of tensors, in any order, are not made; yields name → recipe for them.

    A parameter of n dimensions has the lines that its matrices have, one below the other.
    """
    from transformers import core_model_loading as loading

    merged: dict[str, Recipe] = {}
    sources: dict[int, dict[str, list[str]]] = {}
    converter = loading.WeightConverter
    add, convert, save = converter.add_tensor, converter.convert, loading.offload_and_maybe_resave_param

    def added(self: Any, target: str, source: str, pattern: str, tensor: Any) -> None:
        sources.setdefault(id(self), {}).setdefault(pattern, []).append(source)
        add(self, target, source, pattern, tensor)

    def converted(self: Any, layer_name: str, *args: Any, **kwargs: Any) -> Any:
        names = sources.pop(id(self), {})
        tensors = self.materialize_tensors()
        found = _recipes(self, convert, layer_name, names, tensors, args, kwargs)
        if found is not None:
            merged.update({name: recipe for name, (recipe, _) in found.items()})
            return {name: empty for name, (_, empty) in found.items()}
        self.collected_tensors.update(tensors)
        return convert(self, layer_name, *args, **kwargs)

    def saved(target: str, parameter: Any, info: Any, *others: Any, **kwargs: Any) -> Any:
        if target not in merged:
            return save(target, parameter, info, *others, **kwargs)
        info.missing_keys.discard(target)
        return kwargs["disk_offload_index"] if "disk_offload_index" in kwargs else others[1]

    converter.add_tensor, converter.convert, loading.offload_and_maybe_resave_param = added, converted, saved
    try:
        yield merged
    finally:
        converter.add_tensor, converter.convert, loading.offload_and_maybe_resave_param = add, convert, save


def _recipes(
    converter: Any, convert: Any, layer: str, names: Any, tensors: Any, args: Any, kwargs: Any
) -> dict[str, Any] | None:
    """(recipe, parameter without values) of each result, None unless every one consists of whole lines."""
    import torch

    known = [(name, t) for pattern, own in tensors.items() for name, t in zip(names[pattern], own, strict=True)]
    widths = {t.shape[-1] for _, t in known if t.dim() == 2}
    if len(known) < 2 or any(t.dim() != 2 for _, t in known) or len(widths) != 1:
        return None
    starts, at = {}, 0
    for name, tensor in known:
        starts[name] = at
        at += tensor.shape[0]
    lines = torch.arange(at)[:, None] * 2 + torch.arange(2)
    shown = {
        pattern: [lines[starts[n] : starts[n] + t.shape[0]] for n, t in zip(names[pattern], own, strict=True)]
        for pattern, own in tensors.items()
    }
    converter.collected_tensors.update(shown)
    try:
        made = convert(converter, layer, *args, **{**kwargs, "loading_info": None})
    except Exception:  # what cannot be done to numbers of lines is done to the tensors
        converter.collected_tensors.clear()
        return None
    (width,), dtype = widths, known[0][1].dtype
    found = {}
    for target, order in made.items():
        order = order[0] if isinstance(order, list) else order
        flat = order.reshape(-1, order.shape[-1])
        whole = order.shape[-1] == 2 and bool(((flat[:, 1] == flat[:, 0] + 1) & (flat[:, 0] % 2 == 0)).all())
        if not whole:
            return None
        empty = torch.empty((*order.shape[:-1], width), dtype=dtype, device="meta")
        found[target] = (Recipe(tuple(_pieces((flat[:, 0] // 2).tolist(), known))), empty)
    return found


def _pieces(lines: list[int], known: list[tuple[str, Any]]) -> Iterator[Piece]:
    """Runs of lines that follow each other in one tensor. known: the tensors, whose lines are numbered through."""
    owners = [(name, i) for name, tensor in known for i in range(tensor.shape[0])]
    start = 0
    for at in range(1, len(lines) + 1):
        (name, first), (_, last) = owners[lines[start]], owners[lines[at - 1]]
        if at == len(lines) or owners[lines[at]] != (name, last + 1):
            yield Piece(name, first, last + 1)
            start = at
