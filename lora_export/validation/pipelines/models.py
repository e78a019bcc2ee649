"""A component with its adapters beside it, and with the rounding errors that merging them may make."""

import contextlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lora_export.contracts import Component, DiffusionAdapter
from lora_export.validation.comparing.noise import Magnitudes, rounding_errors, sizes_of
from lora_export.validation.pipelines.activations import CONVOLUTIONS
from lora_export.validation.pipelines.injecting import Changes, inject
from lora_export.validation.pipelines.loading import load
from lora_export.validation.reference.files import FLOATS, Stored

DRAWS = 3


@dataclass
class Unmerged:
    """model: of the base in fp32, with the adapters' work beside its layers; types: of the merged tensors, by name;
    sizes: how large the weights are with the adapters, asked once."""

    component: Component
    model: Any
    changes: Changes
    types: Mapping[str, torch.dtype] = field(default_factory=dict)
    sizes: Magnitudes | None = None

    @classmethod
    def of(cls, component: Component, adapters: Sequence[DiffusionAdapter], variant: str | None) -> "Unmerged":
        model = load(component, variant)
        changes = inject(model, component.name, adapters)
        made = cls(component, model, changes)
        made._change_parameters(changes.parameters)
        return made

    @property
    def changed(self) -> bool:
        return bool(self.changes.names)

    def merged_as(self, stored: Mapping[str, Stored]) -> None:
        """Learn the types that the merged tensors have."""
        self.types = {n: FLOATS[s.dtype] for n, s in stored.items() if s.dtype in FLOATS}

    def release(self) -> None:
        """Free the memory of the model, which answers nothing any more."""
        self.model, self.sizes, self.changes = None, None, replace(self.changes, layers={}, parameters={})

    @contextlib.contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Inside, the model is the base."""
        self.changes.active(False)
        self._change_parameters({n: -v for n, v in self.changes.parameters.items()})
        try:
            yield
        finally:
            self.changes.active(True)
            self._change_parameters(self.changes.parameters)

    @contextlib.contextmanager
    def rounded(self, seed: int) -> Iterator[None]:
        """Inside, what the adapters change carries rounding errors of its type, each up to half a unit in the last
        place."""
        before = {n: self._parameter(n).data.clone() for n in self.changes.parameters}
        for name, (path, parameter) in self.changes.names.items():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {self.component.name} {name}".encode()))
            dtype = self.types.get(name, torch.float32)
            if not path:
                held = self._parameter(parameter)
                held.data = held.data + rounding_errors(held.data, dtype, generator)
                continue
            layer = self.changes.layers[path]
            weight = layer.base_layer.get_parameter(parameter)
            if weight.dim() > 1 or not isinstance(layer.base_layer, nn.Linear | CONVOLUTIONS):
                sizes = self._magnitudes().adapted(f"{path}.{parameter}", weight)
                layer.errors[parameter] = rounding_errors(sizes, dtype, generator)
        try:
            yield
        finally:
            for layer in self.changes.layers.values():
                layer.errors = {}
            for name, value in before.items():
                self._parameter(name).data = value

    def _magnitudes(self) -> Magnitudes:
        if self.sizes is None:
            rows = {}
            for path, layer in self.changes.layers.items():
                rows.update({f"{path}.{n.rpartition('.')[2]}": pair for n, pair in sizes_of(layer)})
            self.sizes = Magnitudes(rows)
        return self.sizes

    def _change_parameters(self, added: Mapping[str, torch.Tensor]) -> None:
        for name, value in added.items():
            held = self._parameter(name)
            held.data = held.data + value

    def _parameter(self, name: str) -> nn.Parameter:
        found: nn.Parameter = self.model.get_parameter(name)
        return found


@contextlib.contextmanager
def all_rounded(unmerged: Sequence[Unmerged], seed: int) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for one in unmerged:
            stack.enter_context(one.rounded(seed))
        yield


@contextlib.contextmanager
def all_without_adapters(unmerged: Sequence[Unmerged]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for one in unmerged:
            stack.enter_context(one.without_adapters())
        yield
