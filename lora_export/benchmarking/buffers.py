"""What one call computes, and the buffers that its inputs and outputs are bound to."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_export.choices import Phase

if TYPE_CHECKING:
    from onnxruntime import OrtValue

# ONNX Runtime's numbers of element types.
ELEMENT = {
    "tensor(float)": 1,
    "tensor(int32)": 6,
    "tensor(int64)": 7,
    "tensor(bool)": 9,
    "tensor(float16)": 10,
    "tensor(bfloat16)": 16,
}


@dataclass(frozen=True)
class Shape:
    """What one call computes: `tokens` new tokens after `past` cached ones, for each of `batch` sequences; of a
    denoiser, a step of `batch` latents with sides of `tokens`."""

    batch: int
    past: int
    tokens: int

    @staticmethod
    def of(phase: Phase, batch: int, prompt: int) -> "Shape":
        return Shape(batch, prompt, 1) if phase == "decode" else Shape(batch, 0, prompt)

    @property
    def total(self) -> int:
        return self.past + self.tokens


@dataclass
class Buffers:
    """The buffers of one cell, shared by all arms whose inputs and outputs look the same.

    One set for all: no arm gets a luckier address, and a long prefill's logits exist once. outputs: what is known
    of a call's outputs → name → element type and dims, which a run found; filled: caches that a run has filled.
    """

    device: str
    outputs: dict[Hashable, Mapping[str, tuple[int, tuple[int, ...]]]] = field(default_factory=dict)
    filled: set[Hashable] = field(default_factory=set)
    values: dict[tuple[Hashable, ...], "OrtValue"] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(value.tensor_size_in_bytes() for value in self.values.values())

    def array(self, name: str, shape: Shape, value: "np.ndarray[Any, Any]") -> "OrtValue":
        import onnxruntime as ort

        key = (name, str(value.dtype), shape)
        if key not in self.values:
            self.values[key] = ort.OrtValue.ortvalue_from_numpy(value, self.device, 0)
        return self.values[key]

    def blank(self, name: str, element: int, dims: tuple[int, ...]) -> "OrtValue":
        """Uninitialized memory of one name, type and shape, the same for all that ask for it."""
        import onnxruntime as ort

        key = (name, element, dims)
        if key not in self.values:
            make = ort.OrtValue.ortvalue_from_shape_and_type
            self.values[key] = make(list(dims), element, self.device, 0)
        return self.values[key]
