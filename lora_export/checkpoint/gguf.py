"""GGUF headers, parsed and distrusted (the format: ggml/docs/gguf.md of ggml-org/llama.cpp, versions 2 and 3).

"GGUF", a version, the numbers of tensors and of settings; the settings, of which only numbers and strings are kept;
for each tensor a name, its dimensions from the innermost on, a type and an offset into the data, which begins at
the next multiple of general.alignment.
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from lora_export.checkpoint.tensor_files import FILES
from lora_export.contracts import TensorInfo
from lora_export.errors import CheckpointError, InputError
from lora_export.storage.documents import LARGEST
from lora_export.storage.sealed import refuse_outward_link

ENDING = ".gguf"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
_LONGEST = 2**16  # bytes of a name


@dataclass(frozen=True)
class GgufFile:
    """tensors by the names of the file; the dtype of each is its ggml type, its shape outermost first."""

    tensors: dict[str, TensorInfo]
    settings: Mapping[str, int | float | bool | str]


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data, self.at = data, 0

    def number(self, form: str) -> int:
        value: int = struct.unpack_from(f"<{form}", self._data, self.at)[0]
        self.at += struct.calcsize(f"<{form}")
        return value

    def text(self) -> str:
        length = self.number("Q")
        if length > len(self._data) - self.at:
            raise ValueError(f"a string of {length} bytes")
        raw = self._data[self.at : self.at + length] if length <= _LONGEST else b""
        self.at += length
        return raw.decode()

    def value(self, kind: int) -> int | float | bool | str | None:
        """None for a list, which is skipped."""
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            return self.number(_SCALARS[kind])
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            self.at += count * struct.calcsize(f"<{_SCALARS[inner]}")
        for _ in range(0 if inner in _SCALARS else count):
            if inner != _TEXT:
                raise ValueError("a list of lists")
            self.text()
        return None


def read_gguf(path: Path) -> GgufFile:
    """Tensors and settings of one GGUF file; no weight is read. CheckpointError for any other file."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(path, data)
    except OSError as error:
        raise CheckpointError(f"the file cannot be read: {error.strerror}", where=path) from None
    except (struct.error, ValueError, KeyError, OverflowError) as error:
        raise CheckpointError(
            f"this is not a sound GGUF file: {error}",
            where=path,
            expected="GGUF of version 2 or 3, little-endian",
            next_step="download the file again",
        ) from None


def _parse(path: Path, data: mmap.mmap) -> GgufFile:
    reader = _Reader(data)
    if data[:4] != b"GGUF":
        raise ValueError("its first bytes are not GGUF")
    reader.at = 4
    version = reader.number("I")
    if version not in (2, 3):
        raise ValueError(f"version {version}")
    tensors, count = reader.number("Q"), reader.number("Q")
    settings = {}
    for _ in range(count):
        name, kind = reader.text(), reader.number("I")
        value = reader.value(kind)
        if value is not None:
            settings[name] = value
    entries = [_entry(reader) for _ in range(tensors)]
    if settings.get("split.count", 1) not in (0, 1):
        raise ValueError("it is one part of several; join them first: llama-gguf-split --merge FIRST OUT")
    alignment = settings.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"an alignment of {alignment}")
    start = -(-reader.at // alignment) * alignment
    infos = [_info(path, *entry, start, len(data)) for entry in entries]
    if len({i.name for i in infos}) != len(infos):
        raise ValueError("a name occurs twice")
    return GgufFile({i.name: i for i in sorted(infos, key=lambda i: i.start)}, settings)


def _entry(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    name, dimensions = reader.text(), reader.number("I")
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise ValueError(f"{name} has {dimensions} dimensions")
    shape = tuple(reader.number("Q") for _ in range(dimensions))[::-1]
    return name, shape, reader.number("I"), reader.number("Q")


def _info(
    path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int, start: int, size: int
) -> TensorInfo:
    quants = library()
    block, length = quants.GGML_QUANT_SIZES[quants.GGMLQuantizationType(kind)]
    elements = prod(shape)
    if not 0 < elements <= LARGEST or shape[-1] % block:
        raise ValueError(f"{name} of shape {list(shape)} in blocks of {block}")
    begin, end = start + offset, start + offset + elements // block * length
    if end > size:
        raise ValueError(f"{name} ends beyond the file")
    return TensorInfo(name, quants.GGMLQuantizationType(kind).name, shape, path, begin, end, FILES)


def gguf_file(folder: Path) -> Path | None:
    """The GGUF file of a folder whose weights it holds; None where safetensors do, or neither.

    InputError for several, or one whose config.json is not there.
    """
    files = sorted(p for p in folder.iterdir() if p.suffix == ENDING and p.is_file())
    if not files or any(p.suffix == ".safetensors" for p in folder.iterdir()):
        return None
    if len(files) > 1:
        raise InputError(
            f"{len(files)} GGUF files in one folder",
            where=folder,
            expected="one, with config.json and the tokenizer beside it",
            next_step="put the one that you mean into a folder of its own; llama-gguf-split --merge FIRST OUT "
            "joins the parts of one model",
        )
    if not (folder / "config.json").is_file():
        raise InputError(
            "a GGUF file without a config.json beside it",
            where=files[0],
            expected="config.json and the tokenizer files of the model that it was made from",
            next_step="copy them from that model's page, or let transformers guess them: "
            "AutoConfig.from_pretrained(DIR, gguf_file=NAME).save_pretrained(DIR), and AutoTokenizer the same",
        )
    refuse_outward_link(files[0])
    return files[0]


def library() -> Any:
    """The gguf package. CheckpointError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise CheckpointError(
            "reading GGUF needs a package that is not installed",
            expected="the package gguf",
            next_step="pip install 'lora-export[gguf]'",
        ) from None
    return gguf
