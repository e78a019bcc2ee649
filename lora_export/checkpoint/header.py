"""safetensors headers, parsed and distrusted.

Format: 8 bytes little-endian header length, a JSON object, then the data; each tensor has a dtype, a shape
and [start, end) offsets into the data (github.com/huggingface/safetensors, README "Format").
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_export.checkpoint.tensor_files import FILES
from lora_export.contracts import TensorInfo
from lora_export.errors import CheckpointError
from lora_export.storage.documents import LARGEST, elements, is_text, parse_json

ITEM_BITS = {
    "C64": 64, "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
MAX_HEADER = 100_000_000  # bytes; the format's own limit
LONGEST_TENSOR_NAME = 1024  # characters; patterns are matched with names, and digits in them become numbers


@dataclass(frozen=True)
class ShardHeader:
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: Path) -> ShardHeader:
    """The tensors of one safetensors file, in the order of their bytes. Raises CheckpointError."""
    try:
        size, length, raw = _read(path)
    except OSError as error:
        raise CheckpointError(f"the file cannot be read: {error.strerror}", where=path) from None
    entries = _parse(path, raw, size)
    del raw
    metadata = entries.pop("__metadata__", {})
    metadata = {} if metadata is None else metadata  # mlx writes null
    if not isinstance(metadata, dict) or not all(isinstance(v, str) and is_text(v) for v in metadata.values()):
        raise _damaged(path, "__metadata__ is not a map of strings")
    data = 8 + length
    infos = [_tensor(path, name, entry, data) for name, entry in entries.items()]
    infos.sort(key=lambda t: (t.start, t.end))
    _check_cover(path, infos, data, size)
    return ShardHeader({t.name: t for t in infos}, metadata)


def header_bytes(path: Path) -> bytes:
    """Length and header of a safetensors file; of a damaged one, what is there of them."""
    with path.open("rb") as f:
        prefix = f.read(8)
        return prefix + f.read(min(int.from_bytes(prefix, "little"), path.stat().st_size))


def _read(path: Path) -> tuple[int, int, bytes]:
    """Size of the file, length of its header, the header. Nothing is read for a length that cannot be true."""
    size = path.stat().st_size
    with path.open("rb") as f:
        prefix = f.read(8)
        if len(prefix) < 8:
            raise _damaged(path, f"the file has {size} bytes, too few for a safetensors header")
        length = int.from_bytes(prefix, "little")
        if length > min(size - 8, MAX_HEADER):
            raise _damaged(path, f"the header claims {length} bytes, the file has {size}")
        return size, length, f.read(length)


def _parse(path: Path, raw: bytes, size: int) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        for name in out:
            if not is_text(name):  # safetensors refuses it, too, and no header could be written with it
                raise CheckpointError("a name in the header is no Unicode text", where=path, tensor=name)
        if len(out) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise CheckpointError("a key stands twice in the header", where=path, tensor=twice)
        return out

    try:
        value = parse_json(raw, size, unique)
    except ValueError as error:
        raise _damaged(path, f"the header is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise _damaged(path, "the header is no JSON object")
    return value


def _tensor(path: Path, name: str, entry: Any, data: int) -> TensorInfo:
    def odd(found: str) -> CheckpointError:
        return CheckpointError(found, where=path, tensor=name, expected="dtype, shape and data_offsets")

    if len(name) > LONGEST_TENSOR_NAME:
        raise odd(f"a name of {len(name)} characters")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise odd("a malformed entry in the header")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise odd(f"unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(_natural(n) for n in shape):
        raise odd(f"shape {shape!r} is no list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_natural(n) for n in offsets):
        raise odd(f"data_offsets {offsets!r} are no two positions")
    start, end = offsets
    count = elements(shape)
    if count is None:
        raise odd(f"no tensor has the shape {shape}")
    needed, bits_left = divmod(count * ITEM_BITS[dtype], 8)
    if end - start != needed or bits_left:
        more = f" and {bits_left} bits" if bits_left else ""
        raise odd(f"{end - start} bytes for a {dtype} tensor of shape {shape}, which needs {needed}{more}")
    return TensorInfo(name, dtype, tuple(shape), path, data + start, data + end, FILES)


def _natural(n: Any) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= LARGEST


def _check_cover(path: Path, infos: list[TensorInfo], data: int, size: int) -> None:
    at = data
    for t in infos:
        if t.start != at:
            what = "overlaps the one before it" if t.start < at else "leaves a hole before it"
            raise CheckpointError(f"the tensor's byte range {what}", where=path, tensor=t.name)
        at = t.end
    if at != size:
        what = "is cut off" if at > size else "has bytes that no tensor claims"
        raise CheckpointError(
            f"the file {what}: its header describes {at} bytes, it has {size}",
            where=path,
            tensor=infos[-1].name if infos else None,
            expected="a complete file",
            next_step="download or copy the file again",
        )


def _damaged(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        found, where=path, expected="a safetensors file", next_step="download or copy the file again"
    )


def build_header(tensors: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """Length prefix and header for (name, dtype, shape) written one after another, padded to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, dtype, shape in tensors:
        end = at + math.prod(shape) * ITEM_BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
