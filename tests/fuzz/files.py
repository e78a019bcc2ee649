"""safetensors files as lists of entries: what a header says and the bytes behind it, to be damaged apart."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from safetensors.torch import save

from lora_export.checkpoint.header import ITEM_BITS
from tests.fuzz.strategies import ODD_TEXTS

DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E8M0", "I64", "I32", "I8", "U8", "BOOL"]
LARGEST = 4096  # elements of a damaged tensor; a shape with a 0 in it may claim more


@dataclass(frozen=True)
class Entry:
    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def entries(tensors: dict[str, torch.Tensor]) -> tuple[Entry, ...]:
    """As the safetensors library writes them."""
    content = save({k: v.contiguous() for k, v in tensors.items()})
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    return tuple(
        Entry(name, e["dtype"], tuple(e["shape"]), data[slice(*e["data_offsets"])]) for name, e in header.items()
    )


def file_bytes(tensors: list[Entry] | tuple[Entry, ...]) -> bytes:
    """A well-formed file of these entries; names may be anything but twice the same."""
    header: dict[str, Any] = {}
    at, chunks = 0, []
    for entry in tensors:
        needed = int(np.prod(entry.shape, dtype=object)) * ITEM_BITS[entry.dtype] // 8
        data = (entry.data * (needed // max(len(entry.data), 1) + 1))[:needed] if entry.data else bytes(needed)
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [at, at + needed]}
        at += needed
        chunks.append(data)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(chunks)


def write(path: Path, tensors: list[Entry] | tuple[Entry, ...]) -> None:
    path.write_bytes(file_bytes(tensors))


SIZES = st.sampled_from([0, 1, 2, 3, 4, 6, 8, 16, 2**31, 2**62, 2**63 - 1]) | st.integers(0, 20)


@st.composite
def damaged_entries(draw: st.DrawFn, valid: tuple[Entry, ...], words: tuple[str, ...] = ()) -> list[Entry]:
    """One to four changes of names, types, shapes and values; words: parts of names that a reader looks for."""
    found = list(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(found) - 1, 0)))
        operation = draw(st.sampled_from(["shape", "shape", "name", "dtype", "data", "remove", "copy", "swap"]))
        if not found:
            break
        entry = found[at]
        match operation:
            case "shape":
                found[at] = replace(entry, shape=_other_shape(draw, entry.shape))
            case "name":
                found[at] = replace(entry, name=_other_name(draw, entry.name, words))
            case "dtype":
                found[at] = replace(entry, dtype=draw(st.sampled_from(DTYPES)))
            case "data":
                found[at] = replace(entry, data=draw(st.binary(max_size=40) | _VALUES))
            case "remove":
                del found[at]
            case "copy":
                found.append(replace(entry, name=_other_name(draw, entry.name, words)))
            case "swap":
                other = draw(st.integers(0, len(found) - 1))
                mine, theirs = found[at], found[other]
                found[at], found[other] = replace(mine, name=theirs.name), replace(theirs, name=mine.name)
    return list({e.name: e for e in found}.values())


_VALUES = st.sampled_from(
    [np.array([v], np.float32).tobytes() for v in (np.nan, np.inf, 1e38, 0)]
    + [np.array([v], np.int64).tobytes() for v in (-1, 2**62, 10**9, 3)]
    + [b"\xff", bytes(1)]
)


def _other_shape(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, ...]:
    sizes = list(shape)
    at = draw(st.integers(0, max(len(sizes) - 1, 0)))
    match draw(st.sampled_from(["size", "size", "drop", "add", "swap", "flat", "any"])):
        case "size" if sizes:
            sizes[at] = draw(SIZES)
        case "drop" if sizes:
            del sizes[at]
        case "add":
            sizes.insert(at, draw(SIZES))
        case "swap":
            sizes.reverse()
        case "flat":
            sizes = [int(np.prod(sizes, dtype=object))]
        case _:
            sizes = draw(st.lists(SIZES, max_size=5))
    while np.prod(sizes, dtype=object) > LARGEST:
        sizes[max(range(len(sizes)), key=lambda i: sizes[i])] = draw(st.sampled_from([0, 1, 2, 3]))
    return tuple(sizes)


def _other_name(draw: st.DrawFn, name: str, words: tuple[str, ...]) -> str:
    parts = name.split(".")
    at = draw(st.integers(0, len(parts) - 1))
    match draw(st.sampled_from(["drop", "word", "insert", "odd", "cut", "any"])):
        case "drop":
            del parts[at]
        case "word" if words:
            parts[at] = draw(st.sampled_from(words))
        case "insert":
            parts.insert(at, draw(st.sampled_from([*words, *ODD_TEXTS])))
        case "odd":
            parts[at] = draw(st.sampled_from(ODD_TEXTS))
        case "cut":
            return name[: draw(st.integers(0, len(name)))]
        case _:
            return draw(st.text(max_size=30))
    return ".".join(parts)
