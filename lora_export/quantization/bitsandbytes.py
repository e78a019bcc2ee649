"""bitsandbytes weights as they lie on disk: NF4 and FP4, absmax nested or not, and LLM.int8.

4 bits (bitsandbytes functional.QuantState.as_dict, packed): X.weight, packed nibbles in any storage dtype;
X.weight.absmax (one per block; uint8 when nested); X.weight.quant_map f32[16]; for nested absmax also
.nested_absmax and .nested_quant_map f32[256]; X.weight.quant_state.bitsandbytes__nf4|fp4, a JSON object.
8 bits: X.weight int8 (out, in), X.SCB fp32 (out,).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lora_export import meta_model
from lora_export.contracts import TensorInfo, TensorSource
from lora_export.errors import CheckpointError, InputError
from lora_export.quantization.stored import FLOATS, FLOATS_OF_TORCH, QuantizedWeight, odd, part
from lora_export.storage.documents import decode, parse_json

if TYPE_CHECKING:
    import torch

TENSORS = "weights with a quant_state (4 bits) or SCB (8 bits)"
STATE = ".quant_state.bitsandbytes__"
LARGEST_STATE = 2**16  # bytes; bitsandbytes writes about 200


@dataclass(frozen=True)
class State:
    """The quant_state of a 4-bit weight. nested_*: where the block scales are quantized themselves."""

    quant_type: str
    blocksize: int
    shape: tuple[int, ...]
    dtype: str
    nested_blocksize: int | None = None
    nested_offset: float | None = None

    @property
    def is_sound(self) -> bool:
        sizes = (self.blocksize, *self.shape, 1 if self.nested_blocksize is None else self.nested_blocksize)
        return bool(self.shape) and min(sizes) > 0 and self.dtype in FLOATS_OF_TORCH


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
        values: torch.Tensor = torch.index_select(pairs, 0, codes.int()).view(torch.float32)
        return values


@dataclass(frozen=True)
class Bnb4Weight(QuantizedWeight):
    """A 4-bit weight known from headers and its JSON state."""

    state: State

    def load(self, source: TensorSource) -> Blocks4Bit:
        absmax = source.read(f"{self.weight}.absmax").reshape(-1)
        if self.state.nested_blocksize is not None:
            absmax = self._unnest(source, absmax, self.state.nested_blocksize)
        code_book = source.read(f"{self.weight}.quant_map").float().reshape(-1)
        packed = partial(source.read_bytes, self.weight)
        return Blocks4Bit(packed, code_book, absmax.float(), self.state.blocksize, self.shape)

    def _unnest(self, source: TensorSource, absmax: "torch.Tensor", blocksize: int) -> "torch.Tensor":
        """Block scales that were quantized in blocks of their own, around an offset (QLoRA §3)."""
        book = source.read(f"{self.weight}.nested_quant_map").float().reshape(-1)
        outer = source.read(f"{self.weight}.nested_absmax").float().reshape(-1)
        spread = outer.repeat_interleave(blocksize)[: absmax.numel()]
        value: torch.Tensor = book[absmax.int()] * spread + float(self.state.nested_offset or 0)
        return value


@dataclass(frozen=True)
class Rows8Bit:
    """One weight: W = q · SCB / 127, row by row (arXiv:2208.07339, §2.1)."""

    codes: "torch.Tensor"
    scb: "torch.Tensor"

    def rows(self, start: int, stop: int) -> "torch.Tensor":
        return self.codes[start:stop].float() * self.scb[start:stop, None] / 127


@dataclass(frozen=True)
class Bnb8Weight(QuantizedWeight):
    def load(self, source: TensorSource) -> Rows8Bit:
        return Rows8Bit(source.read(self.parts[0]), source.read(self.parts[1]).float())


@dataclass(frozen=True)
class WholeRows:
    """Rows of a weight that is in memory already, in fp32."""

    value: "torch.Tensor"

    def rows(self, start: int, stop: int) -> "torch.Tensor":
        return self.value[start:stop]


@dataclass(frozen=True)
class Transposed(QuantizedWeight):
    """A Conv1D's weight, (in, out), of which bitsandbytes stored the transpose. It is dequantized as a whole."""

    stored: QuantizedWeight

    def load(self, source: TensorSource) -> WholeRows:
        return WholeRows(self.stored.load(source).rows(0, self.stored.shape[0]).T.contiguous())


def claims(settings: Mapping[str, Any]) -> bool:
    """Older versions of transformers wrote no quant_method."""
    return bool(settings.get("load_in_4bit") or settings.get("load_in_8bit"))


def describe(settings: Mapping[str, Any]) -> str:
    if settings.get("load_in_8bit"):
        return "bitsandbytes int8"
    double = " with double quantization" if settings.get("bnb_4bit_use_double_quant") else ""
    return f"bitsandbytes {settings.get('bnb_4bit_quant_type', '4 bits')}{double}"


def find(source: TensorSource, config: Mapping[str, Any], dtype: str) -> list[QuantizedWeight]:
    weights: list[QuantizedWeight] = [_four_bits(source, name) for name in source.tensors if STATE in name]
    weights += [_eight_bits(source, name, dtype) for name in source.tensors if name.endswith(".SCB")]
    types = frozenset({str(config.get("model_type"))})
    return [
        Transposed(w.weight, w.parts, w.shape[::-1], w.dtype, w)
        if meta_model.is_conv1d(types, w.weight.rpartition(".")[0])
        else w
        for w in weights
    ]


def _four_bits(source: TensorSource, state_name: str) -> Bnb4Weight:
    weight, _, kind = state_name.partition(STATE)
    info = source.tensors.get(weight)
    if info is None:
        raise odd(source.tensors[state_name], "a quantization state without its weight")
    state = _state(source, state_name, info)
    if state.quant_type != kind or kind not in ("nf4", "fp4"):
        raise _unlike(info, f"quant_type {state.quant_type!r} in a state named {kind!r}")
    elements = math.prod(state.shape)
    if info.nbytes != -(-elements // 2):
        raise _unlike(info, f"{info.nbytes} bytes for {elements} elements of 4 bits")
    blocks, nested = -(-elements // state.blocksize), state.nested_blocksize
    sizes = {"absmax": (blocks, FLOATS if nested is None else ("U8",)), "quant_map": (16, FLOATS)}
    if nested is not None:
        sizes |= {"nested_absmax": (-(-blocks // nested), FLOATS), "nested_quant_map": (256, FLOATS)}
    for name, (size, dtypes) in sizes.items():
        count = math.prod(part(source, weight, f"{weight}.{name}", dtypes, None).shape)
        if count != size:
            raise _unlike(info, f"{name} has {count} values, {size} are needed")
    parts = (weight, *(f"{weight}.{name}" for name in sizes), state_name)
    return Bnb4Weight(weight, parts, state.shape, FLOATS_OF_TORCH[state.dtype], state)


def _state(source: TensorSource, name: str, info: TensorInfo) -> State:
    stored = source.tensors[name]
    if stored.dtype != "U8" or stored.nbytes > LARGEST_STATE:
        raise _unlike(info, f"the quantization state is {stored.nbytes} bytes of type {stored.dtype}")
    try:
        document = parse_json(source.read(name).numpy().tobytes(), stored.nbytes)
        state = decode(document, State, "the quantization state", stored.file)
    except ValueError as error:
        raise _unlike(info, f"the quantization state is not JSON ({error})") from None
    except InputError as error:
        raise _unlike(info, error.found) from None
    if not state.is_sound:
        raise _unlike(
            info,
            f"the quantization state has blocks of {state.blocksize}, nested {state.nested_blocksize}, the shape "
            f"{list(state.shape)} and the dtype {state.dtype!r}",
        )
    if state.nested_blocksize is not None and state.nested_offset is None:
        raise _unlike(info, "the quantization state has a nested_blocksize and no nested_offset")
    return state


def _unlike(info: TensorInfo, found: str) -> CheckpointError:
    return odd(info, found, "a 4-bit weight as bitsandbytes saves it")


def _eight_bits(source: TensorSource, scb: str, dtype: str) -> Bnb8Weight:
    module, scales = scb.removesuffix(".SCB"), source.tensors[scb]
    weight, layout = source.tensors.get(f"{module}.weight"), f"{module}.weight_format"
    if weight is None or weight.dtype != "I8" or len(weight.shape) != 2:
        raise odd(scales, "scales without an int8 matrix")
    if scales.shape != weight.shape[:1]:
        text = f"{list(scales.shape)} scales for a weight of shape {list(weight.shape)}"
        raise odd(scales, text, "one scale for each row")
    if layout in source.tensors:
        _check_layout(source, source.tensors[layout])
    parts = (weight.name, scb, *([layout] if layout in source.tensors else []))
    return Bnb8Weight(weight.name, parts, weight.shape, dtype)


def _check_layout(source: TensorSource, info: TensorInfo) -> None:
    if math.prod(info.shape) != 1 or info.dtype not in ("U8", "I8", "I32", "I64"):
        raise odd(info, f"the shape is {list(info.shape)}, the type {info.dtype}", "0")
    value = int(source.read(info.name))
    if value != 0:
        raise odd(
            info,
            f"weight_format is {value}: a layout of tiles for one kind of GPU",
            "0 (row by row)",
            "load the model with a current bitsandbytes and save it again",
        )
