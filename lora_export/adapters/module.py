"""The parts of one adapted module, known from headers: what a kind checks before it says which weight changes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_export.adapters.kind import AdapterFile, Layer
from lora_export.contracts import TensorInfo
from lora_export.errors import AdapterError

if TYPE_CHECKING:
    import torch

Shapes = tuple[tuple[int | None, ...], ...]
SAVE_AGAIN = "save the adapter again: model.save_pretrained(DIR)"


@dataclass(frozen=True)
class AdaptedModule:
    """The tensors of one module. keys: marker (`lora_A`) → name of the tensor."""

    file: AdapterFile
    name: str
    keys: Mapping[str, str]

    @property
    def weight(self) -> str:
        return f"{self.name}.weight"

    @property
    def bias(self) -> str:
        return f"{self.name}.bias"

    @property
    def used(self) -> tuple[str, ...]:
        return tuple(self.keys.values())

    @property
    def is_conv1d(self) -> bool:
        return self.file.is_conv1d(self.name)

    def shape(self, marker: str) -> tuple[int, ...]:
        """From the header."""
        return self.file.tensors[self.keys[marker]].shape

    def read(self, marker: str) -> "torch.Tensor":
        """As `AdapterFile.read`."""
        return self.file.read(self.keys[marker])

    def indices(self, marker: str, below: int) -> "torch.Tensor":
        """As `AdapterFile.indices`."""
        return self.file.indices(self.keys[marker], below)

    def stored(self, outputs: int | None, inputs: int | None) -> Shapes:
        """The shape of a linear layer's weight as the architecture stores it: (in, out) for a Conv1D."""
        return ((inputs, outputs),) if self.is_conv1d else ((outputs, inputs),)

    def is_flipped(self, shape: tuple[int, ...], outputs: int, inputs: int) -> bool:
        """Whether a weight of this shape is stored (in, out), as GPT-2's Conv1D is. A square one fits both ways."""
        return self.is_conv1d if outputs == inputs else shape == (inputs, outputs)

    def layer(self) -> Layer | None:
        """This module in the base, None without a base. AdapterError if the base has no module of this name."""
        base, file = self.file.base, self.file
        if base is None:
            return None
        layers = base.layers(file.config)
        like = [n for n in layers if f".{n}".endswith(f".{self.name}") or f".{self.name}".endswith(f".{n}")]
        if self.name not in layers and len(like) != 1:
            raise file.refuse(
                "the model has no such module, and it decides what this kind of adapter does",
                tensor=self.name,
                expected="the base that the adapter was trained on, of the class that its configuration names",
            )
        return layers[self.name if self.name in layers else like[0]]

    def need(self, *markers: str) -> None:
        """AdapterError if one of these parts is missing."""
        missing = [m for m in markers if m not in self.keys]
        if missing:
            raise self.file.refuse(
                f"{missing[0]} of this module is missing" + "".join(f", {m} is there" for m in [*self.keys][:1]),
                tensor=self.name,
                expected=" and ".join((", ".join(markers[:-1]), markers[-1])) if markers[1:] else markers[0],
                next_step=SAVE_AGAIN,
            )

    def disagree(self, expected: str, *markers: str, also: str = "") -> AdapterError:
        """The error for parts (all of them, unless named) whose shapes do not go together; also: what they have to
        agree with."""
        first, *others = markers or tuple(self.keys)
        problem = f"the shape is {list(self.shape(first))}"
        if others:
            problem = "the shapes do not match: " + ", ".join(
                f"{m} {list(self.shape(m))}" for m in (first, *others)
            )
        problem += f"; {also}" if also else ""
        return self.file.refuse(problem, tensor=self.keys[first], expected=expected)


def modules(file: AdapterFile, *markers: str) -> list[AdaptedModule]:
    """Every module that has one of these parts or more."""
    return [AdaptedModule(file, name, keys) for name, keys in group(file.tensors, *markers).items()]


def complete(file: AdapterFile, *markers: str) -> list[AdaptedModule]:
    """Every module with these parts; AdapterError for one that lacks a part."""
    adapted = modules(file, *markers)
    for module in adapted:
        module.need(*markers)
    return adapted


def group(tensors: Mapping[str, TensorInfo], *markers: str) -> dict[str, dict[str, str]]:
    """module → {marker: key} for all tensors that carry one of the markers, in the order of the markers."""
    grouped: dict[str, dict[str, str]] = {}
    for key in tensors:
        for marker in markers:
            module = part(key, marker)
            if module is not None:
                grouped.setdefault(module, {})[marker] = key
    return {module: {m: keys[m] for m in markers if m in keys} for module, keys in grouped.items()}


def part(name: str, marker: str) -> str | None:
    """The module of `module.<marker>` or `module.<marker>.weight`; None for a tensor of another name."""
    for ending in (f".{marker}.weight", f".{marker}"):
        if name.endswith(ending):
            return name.removesuffix(ending)
    return None
