"""bitsandbytes 4-bit weights (NF4, FP4; absmax nested or not) as they lie on disk, read into fp32.

Layout (bitsandbytes functional.QuantState.as_dict, packed): X.weight, packed nibbles in any storage dtype;
X.weight.absmax (one per block; uint8 when nested); X.weight.quant_map f32[16]; for nested absmax also
.nested_absmax and .nested_quant_map f32[256]; X.weight.quant_state.bitsandbytes__nf4|fp4, a JSON object.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lora_export.contracts import TensorInfo, TensorSource
from lora_export.errors import CheckpointError
from lora_export.quantization.packed import part

if TYPE_CHECKING:
    import torch

STATE = ".quant_state.bitsandbytes__"
LARGEST_STATE = 2**16  # bytes; bitsandbytes writes about 200
FLOATS = ("F32", "F16", "BF16")
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Blocks4Bit:
    """One weight, still packed. packed(start, stop): bytes of codes, uint8; scale: fp32, one per block."""

    packed: Callable[[int, int], "torch.Tensor"]
    code_book: "torch.Tensor"
    scale: "torch.Tensor"
    blocksize: int
    shape: tuple[int, ...]

    def rows(self, start: int, stop: int) -> "torch.Tensor":
        """Rows [start, stop) in fp32: code_book[nibble] · scale[flat index // blocksize]."""
        width = math.prod(self.shape[1:])
        first, last = start * width, stop * width
        values = self._values(self.packed(first // 2, (last + 1) // 2))[first % 2 :][: last - first]
        block, offset = divmod(first, self.blocksize)
        scale = self.scale[block : -(-last // self.blocksize)]
        if offset or len(values) % self.blocksize:
            values = values * scale.repeat_interleave(self.blocksize)[offset:][: len(values)]
        else:
            values.view(-1, self.blocksize).mul_(scale[:, None])
        return values.reshape(stop - start, *self.shape[1:])

    def _values(self, codes: "torch.Tensor") -> "torch.Tensor":
        """Both values of each byte, high nibble first: one look-up of eight bytes."""
        import torch

        book = self.code_book
        pairs = torch.stack((book.repeat_interleave(16), book.repeat(16)), dim=1).view(torch.int64).reshape(-1)
        found: torch.Tensor = torch.index_select(pairs, 0, codes.int()).view(torch.float32)
        return found


@dataclass(frozen=True)
class Bnb4Weight:
    """A 4-bit weight known from headers and its JSON state; `load` reads it."""

    weight: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    state: Mapping[str, Any]

    def load(self, source: TensorSource) -> Blocks4Bit:
        absmax = source.read(f"{self.weight}.absmax").reshape(-1)
        if "nested_blocksize" in self.state:
            absmax = self._unnest(source, absmax)
        code_book = source.read(f"{self.weight}.quant_map").float().reshape(-1)
        packed = partial(source.read_bytes, self.weight)
        return Blocks4Bit(packed, code_book, absmax.float(), self.state["blocksize"], self.shape)

    def _unnest(self, source: TensorSource, absmax: "torch.Tensor") -> "torch.Tensor":
        """The block scales were quantized themselves, in blocks of their own, around an offset (QLoRA §3)."""
        book = source.read(f"{self.weight}.nested_quant_map").float().reshape(-1)
        outer = source.read(f"{self.weight}.nested_absmax").float().reshape(-1)
        spread = outer.repeat_interleave(self.state["nested_blocksize"])[: absmax.numel()]
        value: torch.Tensor = book[absmax.int()] * spread + self.state["nested_offset"]
        return value


def find(source: TensorSource) -> list[Bnb4Weight]:
    """Every 4-bit weight of a checkpoint, with its state checked against the headers."""
    found = []
    for name in source.tensors:
        if STATE in name:
            found.append(_parse(source, name))
    return found


def _parse(source: TensorSource, state_name: str) -> Bnb4Weight:
    weight, _, kind = state_name.partition(STATE)
    info = source.tensors.get(weight)
    if info is None:
        raise CheckpointError(
            "a quantization state without its weight", where=source.tensors[state_name].file, tensor=state_name
        )
    state = _state(source, state_name, info)
    parts = [weight, f"{weight}.absmax", f"{weight}.quant_map", state_name]
    if "nested_blocksize" in state:
        parts += [f"{weight}.nested_absmax", f"{weight}.nested_quant_map"]
    if state.get("quant_type") != kind or kind not in ("nf4", "fp4"):
        raise _odd(info, f"quant_type {state.get('quant_type')!r} in a state named {kind!r}")
    shape = tuple(state["shape"])
    elements = math.prod(shape)
    if info.nbytes != -(-elements // 2):
        raise _odd(info, f"{info.nbytes} bytes for {elements} elements of 4 bits")
    _check_sizes(source, weight, info, state, elements)
    return Bnb4Weight(weight, tuple(parts), shape, _DTYPES[state["dtype"]], state)


def _check_sizes(
    source: TensorSource, weight: str, info: TensorInfo, state: Mapping[str, Any], elements: int
) -> None:
    blocks = -(-elements // state["blocksize"])
    nested = "nested_blocksize" in state
    sizes = {"absmax": (blocks, ("U8",) if nested else FLOATS), "quant_map": (16, FLOATS)}
    if nested:
        outer = -(-blocks // state["nested_blocksize"])
        sizes |= {"nested_absmax": (outer, FLOATS), "nested_quant_map": (256, FLOATS)}
    for name, (size, dtypes) in sizes.items():
        found = part(source, weight, f"{weight}.{name}", dtypes, None)
        if math.prod(found.shape) != size:
            raise _odd(info, f"{name} has {math.prod(found.shape)} values, {size} are needed")


def _state(source: TensorSource, name: str, info: TensorInfo) -> dict[str, Any]:
    stored = source.tensors[name]
    if stored.dtype != "U8" or stored.nbytes > LARGEST_STATE:
        raise _odd(info, f"the quantization state is {stored.nbytes} bytes of type {stored.dtype}")
    try:
        state: dict[str, Any] = json.loads(source.read(name).numpy().tobytes())
    except (ValueError, RecursionError) as error:
        raise _odd(info, f"the quantization state is not JSON ({error})") from None
    sizes = [state.get("blocksize")] if isinstance(state, dict) else [None]
    if isinstance(state, dict) and "nested_blocksize" in state:
        sizes.append(state["nested_blocksize"])
        if not isinstance(state.get("nested_offset"), float) or not math.isfinite(state["nested_offset"]):
            raise _odd(info, "the quantization state has no finite nested_offset")
    if not all(map(_positive, sizes)):
        raise _odd(info, "the quantization state has no sound blocksize")
    shape, dtype = state.get("shape"), state.get("dtype")
    if not isinstance(shape, list) or not shape or not all(map(_positive, shape)):
        raise _odd(info, f"the quantization state has the shape {shape!r}")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _odd(info, f"the quantization state has the dtype {dtype!r}")
    return state


def _positive(n: Any) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and 0 < n < 2**63


def _odd(info: TensorInfo, found: str) -> CheckpointError:
    return CheckpointError(
        found, where=info.file, tensor=info.name, expected="a 4-bit weight as bitsandbytes saves it"
    )
