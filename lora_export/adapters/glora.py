"""GLoRA (arXiv:2306.07967, eq. 10): W' = W + W ⊙ A + B, b' = b + b ⊙ D + E + W·C."""

from dataclasses import dataclass
from typing import Literal

import torch

from lora_export.adapters.config import Positive
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.module import AdaptedModule, modules
from lora_export.contracts import TargetUpdate

NAME = "GLoRA"
FORMULA = "W + W ⊙ A + B, and the bias b + b ⊙ D + E + W·C"

_PATHS = "ABCDE"
_LEAVES = ("Xd", "Xu", "X", "zeros")
_WORD = {"A": "config_A_B", "B": "config_A_B", "C": "config_C", "D": "config_D_E", "E": "config_D_E"}
Form = Literal["lora", "vector", "constant", "none"]

# A product of two, a value for each row, or one for all.
Term = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Settings:
    """How each path is made, and the rank of those that are products."""

    r: Positive
    config_A_B: Form
    config_C: Form
    config_D_E: Form


@dataclass(frozen=True)
class GeneralizedUpdate:
    """weight + weight ⊙ scale + shift, row by row; the terms are fp32, of all rows."""

    scale: Term
    shift: Term

    def apply(self, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        shift = _rows(self.shift, rows)
        return weight.addcmul(weight, _rows(self.scale, rows).expand_as(weight)).add_(shift)


@dataclass(frozen=True)
class GeneralizedBias:
    """bias + bias ⊙ scale + shift + moved; moved: W·C, fp32 (outputs,), the others of the same size or of 1."""

    scale: torch.Tensor
    shift: torch.Tensor
    moved: torch.Tensor

    def apply(self, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        size = self.moved.shape
        return weight + weight * self.scale.expand(size)[rows] + self.shift.expand(size)[rows] + self.moved[rows]


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each layer's weight, and one for its bias, which W·C needs the base's weight for."""
    file.refuse_weight(NAME)
    rank = file.settings(Settings).r
    markers = [f"glora_{path}.{leaf}" for path in _PATHS for leaf in _LEAVES]
    return [update for module in modules(file, *markers) for update in _updates(module, rank)]


def _updates(module: AdaptedModule, rank: int) -> list[TargetUpdate]:
    forms = {path: _form(module, path) for path in _PATHS}
    outputs, inputs = _size(module, forms, rank)

    def load(_: tuple[int, ...]) -> GeneralizedUpdate:
        return GeneralizedUpdate(_term(module, "A", forms), _term(module, "B", forms))

    def load_bias(_: tuple[int, ...]) -> GeneralizedBias:
        (scale,), (shift,) = (_term(module, path, forms) for path in "DE")
        return GeneralizedBias(scale, shift, _moved(module, forms["C"]))

    # Where the layer has no bias PEFT makes zeros of all three paths, which it saves.
    idle = all(forms[p] == "none" for p in "CDE")
    of_bias = tuple(k for m, k in module.keys.items() if m[len("glora_")] in "CDE")
    used = tuple(k for k in module.used if idle or k not in of_bias)
    weight = TargetUpdate(module.weight, "glora", used, ((outputs, inputs),), load)
    claims = () if idle else of_bias
    return [weight, TargetUpdate(module.bias, "glora_bias", claims, ((outputs,),), load_bias, optional=idle)]


def _form(module: AdaptedModule, path: str) -> str:
    """The word for how this path is made, which the configuration must have too (or the layer has no bias)."""
    marker = f"glora_{path}"
    leaves = {m.rpartition(".")[2] for m in module.keys if m.startswith(f"{marker}.")}
    word = str(module.file.config[_WORD[path]])
    constant = leaves == {"X"} and module.shape(f"{marker}.X") == (1,) and word != "vector"
    one = "constant" if constant else "vector"
    form = {frozenset({"Xd", "Xu"}): "lora", frozenset({"zeros"}): "none"}.get(frozenset(leaves), one)
    if leaves not in ({"Xd", "Xu"}, {"zeros"}, {"X"}) or (form != word and (form != "none" or path in "AB")):
        raise module.file.refuse(
            f"{marker} has {', '.join(sorted(leaves)) or 'no tensors'}, {_WORD[path]} is {word!r}",
            tensor=module.name,
            expected="Xd and Xu for lora, X for vector and constant, zeros for none",
        )
    return form


def _size(module: AdaptedModule, forms: dict[str, str], rank: int) -> tuple[int | None, int | None]:
    """(outputs, inputs) by all paths together, None for what none of them tells. AdapterError if they disagree."""
    outputs, inputs = set[int](), set[int]()
    for path, form in forms.items():
        marker = f"glora_{path}"
        tall, wide = {"A": (outputs, inputs), "B": (outputs, inputs), "C": (inputs, None)}.get(
            path, (outputs, None)
        )
        if form == "lora":
            left, right = module.shape(f"{marker}.Xd"), module.shape(f"{marker}.Xu")
            good = len(left) == len(right) == 2 and left[1] == right[0] == rank and path not in "DE"
        else:
            left = module.shape(f"{marker}.{'zeros' if form == 'none' else 'X'}")
            right = left if len(left) == 2 else (1, 1)
            dimensions = 1 if path in "DE" or form == "constant" else 2
            good = len(left) == dimensions and (form != "vector" or path in "DE" or left[1] == 1)
            good = good and (form != "constant" or left == (1,))
        if not good or (wide is None and right[-1] != 1):
            raise module.file.refuse(
                f"{marker} is {form}, its shapes are {list(left)} and {list(right)}, r is {rank}",
                tensor=module.name,
                expected="matrices of rank r, or vectors, of the layer's size",
            )
        if form != "constant":
            tall.add(left[0])
        if wide is not None and form in ("lora", "none"):
            wide.add(right[-1])
    if len(outputs) > 1 or len(inputs) > 1:
        raise module.file.refuse(
            f"the paths are of {sorted(outputs)} outputs and {sorted(inputs)} inputs",
            tensor=module.name,
            expected="one size",
        )
    return next(iter(outputs), None), next(iter(inputs), None)


def _term(module: AdaptedModule, path: str, forms: dict[str, str]) -> Term:
    if forms[path] == "lora":
        return module.read(f"glora_{path}.Xd"), module.read(f"glora_{path}.Xu")
    return (module.read(f"glora_{path}.{'zeros' if forms[path] == 'none' else 'X'}"),)


def _rows(term: Term, rows: slice) -> torch.Tensor:
    if len(term) == 2:
        return term[0][rows] @ term[1]
    return term[0][rows] if term[0].dim() == 2 else term[0]


def _moved(module: AdaptedModule, form: str) -> torch.Tensor:
    """W·C of the base's W, added up in float64, in the type of what was read."""
    term = _term(module, "C", {"C": form})
    column = (term[0].double() @ term[1].double() if len(term) == 2 else term[0].double())[:, 0]
    if form == "none" and not column.any():
        outputs = module.shape("glora_D.X" if "glora_D.X" in module.keys else "glora_D.zeros")
        if outputs != (1,):
            return term[0].new_zeros(outputs)
    assert module.file.base is not None
    blocks = [block.double() @ column for block in module.file.base.blocks(module.weight)]
    return torch.cat(blocks).to(term[0].dtype)
