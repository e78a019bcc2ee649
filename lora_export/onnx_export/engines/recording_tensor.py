"""A torch tensor that records which checkpoint tensors it is made of: what an engine does to it becomes its recipe.

Engines transpose, slice, join and shift weights while they build a graph. They are given parameters without values
that record these operations.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from lora_export.errors import ExportError
from lora_export.onnx_export.engines.model_without_weights import ModelWithoutWeights
from lora_export.onnx_export.weights.map import Piece, Recipe

_SAME = frozenset(
    {
        "detach", "to", "float", "contiguous", "clone", "cpu", "requires_grad_", "type", "half", "bfloat16",
        "data.__get__", "squeeze_",
    }
)  # fmt: skip
_SHAPED = frozenset({"reshape", "view", "flatten", "reshape_as", "view_as", "squeeze", "unsqueeze"})
_TURNED = frozenset({"T.__get__", "mT.__get__", "t", "transpose", "permute", "swapaxes"})
_LIKE = frozenset({"zeros_like", "ones_like", "empty_like", "full_like"})  # use only type and shape


class RecordingTensor(torch.Tensor):
    """recipe: None after an operation that no recipe describes; the tensor may still be used for its shape or, if
    it has values, as a constant. sources: the checkpoint tensors that it depends on."""

    recipe: Recipe | None
    sources: frozenset[str]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*_together(args), **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            sources = frozenset() if _name(func) in _LIKE else _sources(args)
            return with_recipe(result, _follow(_name(func), result, args, kwargs or {}), sources)
        if isinstance(result, tuple) and _name(func) in ("split", "chunk"):
            return _parts(result, args)
        return result


def with_recipe(
    tensor: torch.Tensor, recipe: Recipe | None, sources: frozenset[str] = frozenset()
) -> RecordingTensor:
    """The same tensor with a recipe. sources: what it depends on, if there is no recipe."""
    described = tensor.as_subclass(RecordingTensor)
    described.recipe = recipe
    described.sources = frozenset(p.tensor for p in recipe.pieces) if recipe else sources
    return described


def describe(model: ModelWithoutWeights) -> None:
    """Let every parameter of `model` that is a tensor of the checkpoint record which."""
    made: dict[int, torch.Tensor] = {}
    for prefix, module in model.model.named_modules():
        for leaf, parameter in module._parameters.items():
            name = f"{prefix}.{leaf}" if prefix else leaf
            if parameter is None or name not in {**model.tensors, **model.merged}:
                continue
            if id(parameter) not in made:
                rows = parameter.shape[0] if parameter.dim() else 1
                recipe = model.merged.get(name) or Recipe((Piece(model.tensors[name], 0, rows),))
                made[id(parameter)] = torch.nn.Parameter(with_recipe(parameter.data, recipe), requires_grad=False)
            module._parameters[leaf] = made[id(parameter)]


def recipe_of(tensor: torch.Tensor, name: str) -> Recipe:
    """The recipe of `tensor`; ExportError if there is none. name: of the initializer.

    A recipe without pieces means that the values are known and never change.
    """
    recipe = getattr(tensor, "recipe", None)
    if recipe is None and not tensor.is_meta:
        return Recipe(computed_from=tuple(sorted(getattr(tensor, "sources", ()))))
    if recipe is None:
        raise ExportError(f"the engine computes {name} in a way that no recipe describes", tensor=name)
    assert isinstance(recipe, Recipe)
    return recipe


def _sources(args: Iterable[Any]) -> frozenset[str]:
    names: frozenset[str] = frozenset()
    for value in args:
        if isinstance(value, list | tuple):
            names |= _sources(value)
        names |= getattr(value, "sources", frozenset())
    return names


def _together(args: Sequence[Any]) -> Sequence[Any]:
    """Join a tensor with values and one without: the values are not needed."""
    tensors = args[0] if args and isinstance(args[0], list | tuple) else ()
    if len({t.device for t in tensors if isinstance(t, torch.Tensor)}) < 2:
        return args
    return ([t.to("meta") for t in tensors], *args[1:])


def _name(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", "")
    owner = getattr(getattr(func, "__self__", None), "__name__", "")
    return f"{owner}.{name}" if name == "__get__" else name


def _follow(name: str, result: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Recipe | None:
    """The recipe of what the function `name` made of `args`; None if there is none."""
    if name in ("cat", "concat", "concatenate"):
        return _joined(args[0], result)
    first = next((a for a in args if isinstance(a, RecordingTensor)), None)
    recipe: Recipe | None = getattr(first, "recipe", None)
    if first is None or recipe is None:
        return None
    if name in _SAME:
        return recipe
    if name in _SHAPED:
        return recipe if not recipe.transposed or result.shape == first.shape else None
    if name in _TURNED:
        return _turned(recipe, first, result)
    if name == "__getitem__":
        return _sliced(recipe, first, args[1])
    if name in ("add", "__add__", "__radd__"):
        number = next((a for a in args if isinstance(a, int | float)), None)
        return None if number is None or len(args) > 2 or kwargs else replace(recipe, plus=recipe.plus + number)
    return None


def _turned(recipe: Recipe, before: torch.Tensor, after: torch.Tensor) -> Recipe | None:
    if before.dim() == 1:
        return recipe
    if before.dim() != 2 or after.shape != before.shape[::-1] or after.stride() != before.stride()[::-1]:
        return None
    return replace(recipe, transposed=not recipe.transposed)


def _joined(tensors: Iterable[Any], result: torch.Tensor) -> Recipe | None:
    """One below another; or, if all are transposed, side by side."""
    recipes = [getattr(t, "recipe", None) for t in tensors]
    if not recipes or any(r is None for r in recipes):
        return None
    known: list[Recipe] = [r for r in recipes if r is not None]
    ways = {(r.transposed, r.plus) for r in known}
    height = sum(p.stop - p.start for r in known for p in r.pieces)
    if len(ways) != 1 or result.shape[1 if known[0].transposed else 0] != height:
        return None
    return replace(known[0], pieces=tuple(p for r in known for p in r.pieces))


def _sliced(recipe: Recipe, tensor: torch.Tensor, index: Any) -> Recipe | None:
    rows, *others = index if isinstance(index, tuple) else (index,)
    if recipe.transposed or not isinstance(rows, slice) or any(o != slice(None) for o in others):
        return None
    if sum(p.stop - p.start for p in recipe.pieces) != tensor.shape[0]:  # matrices of experts, whose lines are rows
        return None
    start, stop, step = rows.indices(tensor.shape[0])
    return _rows(recipe, start, stop) if step == 1 else None


def _rows(recipe: Recipe, start: int, stop: int) -> Recipe:
    pieces, at = [], 0
    for piece in recipe.pieces:
        height = piece.stop - piece.start
        low, high = max(start - at, 0), min(stop - at, height)
        if low < high:
            pieces.append(Piece(piece.tensor, piece.start + low, piece.start + high))
        at += height
    return replace(recipe, pieces=tuple(pieces))


def _parts(result: tuple[torch.Tensor, ...], args: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    whole, at, parts = args[0], 0, []
    recipe = getattr(whole, "recipe", None)
    for part in result:
        own = None
        if recipe is not None and not recipe.transposed and part.shape[1:] == whole.shape[1:]:
            own = _rows(recipe, at, at + part.shape[0])
        parts.append(with_recipe(part, own, _sources(args)))
        at += part.shape[0]
    return tuple(parts)
