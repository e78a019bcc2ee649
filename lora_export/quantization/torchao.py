"""Weights of torchao as transformers saves them (torchao/prototype/safetensors/safetensors_support.py).

The metadata of the file has a JSON text for each weight X.w, {"_type", "_data", "_tensor_data_names"}; its parts
are the tensors X._w_qdata and so on. Int8Tensor, IntxUnpackedToInt8Tensor: qdata int8 (out, in), a block of
`block_size` is (q − zero) · scale; Float8Tensor: the same of fp8, without zero. Int4Tensor: qdata (out, in / 2),
two signed values of 4 bits a byte, the first in the lowest; scale and zero_point (in / size, out), W = q · scale +
zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_export.contracts import TensorSource
from lora_export.errors import CheckpointError
from lora_export.quantization.scaled import Block, block_of, scaled_weight
from lora_export.quantization.stored import FLOATS, FLOATS_OF_TORCH, ORIGINAL, QuantizedWeight, expect, odd, part
from lora_export.storage.documents import decode, parse_json

if TYPE_CHECKING:
    import torch

PLAIN = {"Int8Tensor": ("I8",), "IntxUnpackedToInt8Tensor": ("I8",), "Float8Tensor": ("F8_E4M3", "F8_E5M2")}
TENSORS = "metadata that names the parts of each weight"


@dataclass(frozen=True)
class DtypeName:
    _data: str = ""


@dataclass(frozen=True)
class Attributes:
    block_size: tuple[int, ...] | None = None
    dtype: DtypeName | None = None


@dataclass(frozen=True)
class TensorMetadata:
    """The JSON text that describes one weight."""

    _type: str
    _data: Attributes | None = None
    _tensor_data_names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class NibbleRows:
    """packed: (out, in / 2) bytes; scale, zero: fp32 (groups, out)."""

    packed: "torch.Tensor"
    scale: "torch.Tensor"
    zero: "torch.Tensor"
    size: int

    def rows(self, start: int, stop: int) -> "torch.Tensor":
        """Rows [start, stop) in fp32."""
        import torch

        words = self.packed[start:stop].view(torch.uint8).to(torch.int32)
        codes = torch.stack((words & 15, words >> 4), -1).reshape(len(words), -1)
        signed = ((codes ^ 8) - 8).float()
        scale, zero = (t[:, start:stop].T.repeat_interleave(self.size, 1) for t in (self.scale, self.zero))
        value: torch.Tensor = signed * scale + zero
        return value


@dataclass(frozen=True)
class NibbleWeight(QuantizedWeight):
    size: int

    def load(self, source: TensorSource) -> NibbleRows:
        packed, scale, zero = (source.read(name) for name in self.parts)
        return NibbleRows(packed, scale.float(), zero.float(), self.size)


def find(source: TensorSource, config: Mapping[str, Any], dtype: str) -> list[QuantizedWeight]:
    weights = []
    for name, text in getattr(source, "metadata", {}).items():
        if "." not in name or not text.startswith("{"):
            continue
        try:
            document = parse_json(text.encode(), len(text.encode()))
        except ValueError as error:
            raise CheckpointError(f"torchao's metadata of {name} is not JSON: {error}", tensor=name) from None
        described = decode(document, TensorMetadata, "torchao's metadata", name)
        if described._type != "Tensor":
            weights.append(_weight(source, name, described, dtype))
    return weights


def _weight(source: TensorSource, weight: str, described: TensorMetadata, dtype: str) -> QuantizedWeight:
    attributes, kind = described._data or Attributes(), described._type
    module, _, leaf = weight.rpartition(".")
    names = {n: f"{module}._{leaf}_{n}" for n in described._tensor_data_names or ()}
    sizes = attributes.block_size or ()
    block = block_of(sizes)
    if kind not in (*PLAIN, "Int4Tensor") or "act_pre_scale" in names or block is None:
        reason = "with scaled inputs" if "act_pre_scale" in names else f"in blocks of {list(sizes)}"
        if kind not in (*PLAIN, "Int4Tensor"):
            reason = "whose bytes are laid out for one kind of device"
        raise CheckpointError(
            f"torchao's {kind} {reason}",
            where=next((t.file for n, t in source.tensors.items() if n.startswith(f"{module}.")), None),
            tensor=weight,
            expected=", ".join((*PLAIN, "Int4Tensor")) + "; two dimensions",
            next_step=ORIGINAL,
        )
    own = FLOATS_OF_TORCH.get(attributes.dtype._data if attributes.dtype else "", dtype)
    codes, scale = (f"{module}._{leaf}_{n}" for n in ("qdata", "scale"))
    if kind == "Int4Tensor":
        return _nibbles(source, weight, (codes, scale, f"{module}._{leaf}_zero_point"), block)
    part(source, weight, codes, PLAIN[kind])  # two dimensions
    beside = [n for part_name, n in names.items() if part_name not in ("qdata", "scale", "zero_point")]
    return scaled_weight(source, weight, scale, names.get("zero_point"), own, PLAIN[kind], block, codes, beside)


def _nibbles(source: TensorSource, weight: str, names: tuple[str, str, str], block: Block) -> NibbleWeight:
    packed = part(source, weight, names[0], ("U8", "I8"))
    scale, zero = (part(source, weight, n, FLOATS) for n in names[1:])
    rows, columns = packed.shape[0], packed.shape[1] * 2
    if block[0] != 1 or columns % block[1]:
        raise odd(packed, f"blocks of {list(block)} in {columns} inputs")
    expect(scale, (columns // block[1], rows))
    expect(zero, scale.shape)
    return NibbleWeight(weight, names, (rows, columns), scale.dtype, block[1])
