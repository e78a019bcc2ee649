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
from lora_export.quantization.affine import AffineWeight, affine_weight
from lora_export.quantization.gptq import FLOATS
from lora_export.quantization.packed import expect, part
from lora_export.storage.documents import Kind, check, parse_json

if TYPE_CHECKING:
    import torch

PLAIN = {"Int8Tensor": ("I8",), "IntxUnpackedToInt8Tensor": ("I8",), "Float8Tensor": ("F8_E4M3", "F8_E5M2")}
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_TENSOR: Kind = {"_type": str, "_data?": (None, dict), "_tensor_data_names?": (None, [str])}
_ATTRIBUTES: Kind = {"block_size?": (None, [int]), "dtype?": (None, {"_data?": str})}


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
class NibbleWeight:
    weight: str
    parts: tuple[str, ...]
    shape: tuple[int, int]
    dtype: str
    size: int

    def load(self, source: TensorSource) -> NibbleRows:
        packed, scale, zero = (source.read(name) for name in self.parts)
        return NibbleRows(packed, scale.float(), zero.float(), self.size)


def find(source: TensorSource, settings: Mapping[str, Any], dtype: str) -> list[AffineWeight | NibbleWeight]:
    """Every weight of torchao in a checkpoint, checked by headers; dtype: of those whose metadata names none."""
    found = []
    for name, text in getattr(source, "metadata", {}).items():
        if "." not in name or not text.startswith("{"):
            continue
        try:
            told = parse_json(text.encode(), len(text.encode()))
        except ValueError as error:
            raise CheckpointError(f"torchao's metadata of {name} is no JSON: {error}", tensor=name) from None
        check(told, _TENSOR, "torchao's metadata", name)
        if told["_type"] != "Tensor":
            found.append(_weight(source, name, told, dtype))
    return found


def _weight(source: TensorSource, weight: str, told: Mapping[str, Any], dtype: str) -> AffineWeight | NibbleWeight:
    attributes, kind = told.get("_data") or {}, told["_type"]
    check(attributes, _ATTRIBUTES, "torchao's metadata", weight)
    module, _, leaf = weight.rpartition(".")
    names = {n: f"{module}._{leaf}_{n}" for n in told.get("_tensor_data_names") or ()}
    block: list[int] = attributes.get("block_size") or []
    if kind not in (*PLAIN, "Int4Tensor") or "act_pre_scale" in names or len(block) != 2:
        reason = "with scaled inputs" if "act_pre_scale" in names else f"in blocks of {block}"
        if kind not in (*PLAIN, "Int4Tensor"):
            reason = "whose bytes lie as one kind of device reads them"
        raise CheckpointError(
            f"torchao's {kind} {reason}",
            where=next((t.file for n, t in source.tensors.items() if n.startswith(f"{module}.")), None),
            tensor=weight,
            expected=", ".join((*PLAIN, "Int4Tensor")) + "; two dimensions",
            next_step="give the unquantized base model that this one was made from as -b",
        )
    own = TYPES.get(str((attributes.get("dtype") or {}).get("_data")), dtype)
    codes, scale = (f"{module}._{leaf}_{n}" for n in ("qdata", "scale"))
    if kind == "Int4Tensor":
        return _nibbles(source, weight, (codes, scale, f"{module}._{leaf}_zero_point"), block)
    beside = [n for part_name, n in names.items() if part_name not in ("qdata", "scale", "zero_point")]
    return affine_weight(source, weight, (codes, scale, names.get("zero_point")), beside, own, PLAIN[kind], block)


def _nibbles(source: TensorSource, weight: str, names: tuple[str, str, str], block: list[int]) -> NibbleWeight:
    packed = part(source, weight, names[0], ("U8", "I8"))
    scale, zero = (part(source, weight, n, FLOATS) for n in names[1:])
    rows, columns = packed.shape[0], packed.shape[1] * 2
    if block[0] != 1 or block[1] < 1 or columns % block[1]:
        raise CheckpointError(f"blocks of {block} in {columns} inputs", where=packed.file, tensor=packed.name)
    expect(scale, (columns // block[1], rows))
    expect(zero, scale.shape)
    return NibbleWeight(weight, names, (rows, columns), scale.dtype, block[1])
