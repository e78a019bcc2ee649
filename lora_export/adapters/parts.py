"""The parts of one adapted layer by their headers: what most kinds check before they say which weight they fit."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_export.adapters.keys import group
from lora_export.adapters.kind import AdapterFile, Layer
from lora_export.errors import AdapterError

if TYPE_CHECKING:
    import torch

Shapes = tuple[tuple[int | None, ...], ...]


@dataclass(frozen=True)
class Layered:
    """The tensors of one module: marker → key."""

    file: AdapterFile
    name: str
    keys: Mapping[str, str]

    @property
    def used(self) -> tuple[str, ...]:
        return tuple(self.keys.values())

    def shape(self, marker: str) -> tuple[int, ...]:
        """From the header."""
        return self.file.tensors[self.keys[marker]].shape

    def read(self, marker: str) -> "torch.Tensor":
        return self.file.read(self.keys[marker])

    def integers(self, marker: str, below: int) -> "torch.Tensor":
        """int64 of any shape; AdapterError unless all are of [0, below)."""
        return integers(self.file, self.keys[marker], below)

    def model_layer(self) -> Layer | None:
        """The module of the base; None where the adapter is looked at without a base. AdapterError if it has none
        of that name."""
        if self.file.base is None:
            return None
        layers = self.file.base.layers(self.file.config)
        like = [n for n in layers if f".{n}".endswith(f".{self.name}") or f".{self.name}".endswith(f".{n}")]
        if self.name not in layers and len(like) != 1:
            raise self.file.refuse(
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
                f"{missing[0]} of this module is missing",
                tensor=self.name,
                expected=", ".join(markers),
                next_step="save the adapter again: model.save_pretrained(DIR)",
            )

    def disagree(self, *markers: str, expected: str) -> AdapterError:
        """The error for parts whose shapes do not go together."""
        shapes = ", ".join(f"{m} {list(self.shape(m))}" for m in markers)
        return self.file.refuse(f"the shapes are {shapes}", tensor=self.keys[markers[0]], expected=expected)


def layered(file: AdapterFile, markers: Sequence[str]) -> list[Layered]:
    """Every module that has one of these parts."""
    return [Layered(file, name, keys) for name, keys in group(file.tensors, tuple(markers)).items()]


def linear_shapes(file: AdapterFile, module: str, outputs: int | None, inputs: int | None) -> Shapes:
    """The shape of a linear layer's weight as the architecture stores it: (in, out) for a Conv1D."""
    return ((inputs, outputs),) if file.is_conv1d(module) else ((outputs, inputs),)


def integers(file: AdapterFile, key: str, below: int) -> "torch.Tensor":
    """A tensor of whole numbers as int64; AdapterError for other types, or a number outside of [0, below)."""
    stored = file.source.read(key)
    if stored.dtype.is_floating_point or stored.dtype.is_complex:
        raise file.refuse(f"the type is {stored.dtype}", tensor=key, expected="whole numbers")
    found = stored.long()
    if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < below:
        raise file.refuse(
            f"positions from {int(found.min())} to {int(found.max())}",
            tensor=key,
            expected=f"positions from 0 to {below - 1}",
        )
    return found


def in_order(file: AdapterFile, modules: Collection[str]) -> list[str]:
    """The modules in the order of the model. AdapterError for one that the model does not have."""
    assert file.base is not None
    order = {n: i for i, n in enumerate(file.base.layers(file.config))}
    unknown = [n for n in modules if n not in order]
    if unknown:
        raise file.refuse(
            "the model has no such module, and the order of its modules decides what belongs to which",
            tensor=unknown[0],
            expected="the base that the adapter was trained on, of the class that its configuration names",
        )
    return sorted(modules, key=lambda n: order[n])


def one_of(file: AdapterFile, key: str, words: Sequence[Any]) -> Any:
    """A setting that has to be one of `words`; AdapterError names it otherwise."""
    value = file.config.get(key)
    if not any(type(value) is type(w) and value == w for w in words):
        raise file.refuse(f"{key} is {value!r}", expected=" or ".join(repr(w) for w in words))
    return value
