"""What an adapter kind is: one module that claims tensors of an adapter file and turns them into updates."""

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lora_export import meta_model
from lora_export.adapters import config as configuration
from lora_export.choices import ExpertLayout, ExpertPacking
from lora_export.contracts import TargetUpdate, TensorInfo, TensorSource
from lora_export.errors import AdapterError
from lora_export.finite import all_below

if TYPE_CHECKING:
    import torch

_wide: ContextVar[bool] = ContextVar("wide", default=False)
_EXPERTS_IN_OUT = frozenset({"gpt_oss", "aria", "aria_text", "openai_privacy_filter"})


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Within this, in this thread, updates are loaded with all their numbers in float64, products of them too."""
    before = _wide.set(True)
    try:
        yield
    finally:
        _wide.reset(before)


def is_float64() -> bool:
    return _wide.get()


@dataclass(frozen=True)
class Layer:
    """A module of the base. linear: nn.Linear or Conv1D; shape: of its weight as it is stored; scale: what the
    forward of an embedding multiplies with what it looked up (Gemma's √width), 1 for most."""

    linear: bool
    embedding: bool
    shape: tuple[int, ...]
    conv1d: bool = False
    scale: float = 1.0


class BaseModel(Protocol):
    """What some kinds need of the base besides the weight that they change. Names are an adapter's."""

    def layers(self, config: Mapping[str, Any]) -> Mapping[str, Layer]:
        """The modules with a weight in the order of the model that the adapter was trained on, which is a class of
        transformers that its configuration names. CheckpointError if transformers cannot build it."""
        ...

    def has(self, weight: str) -> bool:
        """Whether the base has such a weight or bias."""
        ...

    def blocks(self, weight: str) -> "Iterator[torch.Tensor]":
        """Blocks of rows of a weight or bias, fp32, as a merge takes them; AdapterError if there is no such."""
        ...


@dataclass(frozen=True)
class AdapterFile:
    """An adapter on disk, known from its headers.

    where: its adapter_config.json, or the file where that is all there is; weight: the factor that the user
    gave it (`-a ADAPTER:0.7`). The rest decides what the file does not say: how B of fused experts is packed
    (all experts of a rank together, or all ranks of an expert), the layout of square expert weights, every
    model_type in the base's configuration (empty: unknown) and the shapes of its weights by name, for kinds
    that draw random matrices of the largest size again. base: None where an adapter is looked at without one.
    tied: training changed a head that is tied to an embedding with it; token_modules: asks the base which of
    its modules have a row for each token; defined: the names of the architecture's parameters, in the order in
    which its modules define them (empty: unknown).
    """

    source: TensorSource
    config: Mapping[str, Any]
    where: Path
    weight: float = 1.0
    expert_packing: ExpertPacking = "auto"
    expert_layout: ExpertLayout = "auto"
    base_model_types: frozenset[str] = frozenset()
    base_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    allow_nonfinite: bool = False
    base: BaseModel | None = None
    tied: bool = False
    token_modules: Callable[[], Collection[str]] = frozenset
    defined: Callable[[], Sequence[str]] = tuple

    @property
    def folder(self) -> Path:
        return self.where if self.where.suffix == ".safetensors" else self.where.parent

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.source.tensors

    @property
    def stores_experts_in_out(self) -> bool:
        """Whether the architecture keeps fused experts as (experts, in, out), and says so (is_transposed)."""
        return bool(self.base_model_types & _EXPERTS_IN_OUT)

    def is_conv1d(self, module: str) -> bool:
        """Whether the layer is a Conv1D, whose weight is stored (in, out).

        The configuration's fan_in_fan_out is no proof: PEFT writes what was true of the last adapted layer.
        """
        if not self.base_model_types:
            return bool(self.config.get("fan_in_fan_out"))
        return meta_model.is_conv1d(self.base_model_types, module)

    def base_shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a weight of the base, whose names may have another prefix; None if it is not known."""
        if name in self.base_shapes:
            return self.base_shapes[name]
        return next(
            (
                s
                for n, s in self.base_shapes.items()
                if f".{n}".endswith(f".{name}") or f".{name}".endswith(f".{n}")
            ),
            None,
        )

    def read(self, key: str, rows: slice | None = None) -> "torch.Tensor":
        """A tensor in fp32, or rows of it (within `float64`: in that); NaN or infinity are refused.

        They would spread to the whole weight.
        """
        import torch

        stored = self.source.read(key) if rows is None else self.source.read_rows(key, rows.start, rows.stop)
        value = stored.to(torch.float64 if _wide.get() else torch.float32)
        if not (self.allow_nonfinite or all_below(value, math.inf) or bool(torch.isfinite(value).all())):
            raise AdapterError(
                "the adapter holds NaN or infinity",
                where=self.tensors[key].file,
                tensor=self.tensors[key].name,
                expected="finite numbers",
                next_step="use an earlier checkpoint, as this training diverged; "
                "--allow-nonfinite accepts it as it is",
            )
        return value

    def indices(self, key: str, below: int) -> "torch.Tensor":
        """A tensor of indices of any stored type, as int64; AdapterError for one outside of [0, below)."""
        import torch

        stored = self.source.read(key)
        indices = stored.to(torch.int64)
        if not indices.numel():
            return indices
        least, largest, whole = int(indices.min()), int(indices.max()), bool((indices == stored).all())
        if not whole or least < 0 or largest >= below:
            problem = f"indices from {least} to {largest}" if whole else "the indices are not whole numbers"
            raise self.refuse(problem, tensor=key, expected=f"whole numbers from 0 to {below - 1}")
        return indices

    def shape(self, key: str, dimensions: int) -> tuple[int, ...]:
        """The shape of a tensor, which is refused unless it has so many dimensions."""
        shape = self.tensors[key].shape
        if len(shape) != dimensions:
            raise self.refuse(f"the shape is {list(shape)}", tensor=key, expected=f"{dimensions} dimensions")
        return shape

    def settings(self, type_: type[configuration.S]) -> configuration.S:
        """The fields of the configuration that a frozen dataclass names; see config.settings."""
        return configuration.settings(self.config, type_, self.where)

    def refuse(self, found: str, *, tensor: str | None = None, expected: str, next_step: str = "") -> AdapterError:
        """The error for something in this adapter; it is for the caller to raise."""
        if tensor is not None and tensor in self.tensors:
            tensor = self.tensors[tensor].name  # as the file has it
        return AdapterError(found, where=self.folder, tensor=tensor, expected=expected, next_step=next_step or None)

    def refuse_unused(self, setting: str, tensor: str) -> AdapterError:
        """The error for a tensor that PEFT would not load, as a setting says that it was not saved."""
        return self.refuse(
            f"{setting} is false, but the file holds a tensor that PEFT would not use",
            tensor=tensor,
            expected=f"{setting}: true, or a file without such tensors",
        )

    def refuse_weight(self, kind: str, tensor: str | None = None) -> None:
        """For kinds whose update is no sum: a factor other than 1 has no meaning that PEFT shares."""
        if self.weight != 1.0:
            raise self.refuse(
                f"{kind} is not a delta that a weight can scale, and the weight is {self.weight:g}",
                tensor=tensor,
                expected="weight 1",
                next_step="give the adapter without a weight",
            )

    def refuse_factor(self, kind: str) -> None:
        """For kinds whose delta PEFT gives no factor, so that no oracle says what a weight other than 1 makes."""
        if self.weight != 1.0:
            raise self.refuse(
                f"PEFT does not scale the delta of {kind}, and the weight is {self.weight:g}",
                expected="weight 1",
                next_step="give the adapter without a weight, or merge it with --combine linear",
            )


class Kind(Protocol):
    """A module of this package. One file a kind: its keys, its formula, its refusals.

    NAME: for people; FORMULA: the merged weight in one line.
    """

    @property
    def NAME(self) -> str: ...
    @property
    def FORMULA(self) -> str: ...

    def read(self, file: AdapterFile) -> list[TargetUpdate]:
        """One update for each weight that this kind changes. It claims its tensors by `TargetUpdate.keys`, and
        leaves what is another kind's alone; AdapterError for what it knows and cannot merge."""
        ...


class Layout(Protocol):
    """A module of this package for files of another trainer, which no kind can read as they are."""

    @property
    def NAME(self) -> str: ...

    def claims(self, file: AdapterFile) -> bool:
        """Whether this trainer wrote the file."""
        ...

    def as_peft(self, file: AdapterFile) -> AdapterFile:
        """The same adapter in PEFT's names, shapes and configuration; nothing is read before it is asked for."""
        ...
