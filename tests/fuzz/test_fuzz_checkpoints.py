"""safetensors headers, and folders of shards under an index."""

import json
import math
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors.torch import load, save

from lora_export.checkpoint import Checkpoint, TensorFiles, open_checkpoint
from lora_export.checkpoint.header import ITEM_BITS, ShardHeader, build_header, read_header
from lora_export.contracts import TensorInfo
from lora_export.errors import LoraExportError
from tests.fuzz.guard import attempt, harness
from tests.fuzz.strategies import damaged_bytes, encoded, json_files

ENTRIES = {
    "__metadata__": {"format": "pt"},
    "model.a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [5], "data_offsets": [24, 34]},
    "c": {"dtype": "U8", "shape": [0, 4], "data_offsets": [34, 34]},
    "s": {"dtype": "I64", "shape": [], "data_offsets": [34, 42]},
}
DATA = bytes(range(42))
VALID = len(encoded(ENTRIES)).to_bytes(8, "little") + encoded(ENTRIES) + DATA


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A file whose header is damaged as text, or as a tree with all lengths right, or that is no file at all."""
    if draw(st.booleans()):
        return draw(damaged_bytes(VALID) | st.binary(max_size=80))
    header = draw(json_files(ENTRIES, ("dtype", "shape", "data_offsets", "__metadata__")))
    length = draw(st.just(len(header)) | st.integers(0, 2**64 - 1))
    data = draw(st.just(DATA) | st.binary(max_size=60))
    return length.to_bytes(8, "little") + header + data


def check_ranges(tensors: "dict[str, TensorInfo]") -> None:
    """Every range inside its file, none over another, each as long as its shape says; every tensor can be read."""
    by_file: dict[Path, list[TensorInfo]] = {}
    for name, info in tensors.items():
        assert name == info.name
        assert 8 <= info.start <= info.end <= info.file.stat().st_size
        assert 8 * info.nbytes == math.prod(info.shape) * ITEM_BITS[info.dtype]
        by_file.setdefault(info.file, []).append(info)
        if not info.dtype.startswith(("F4", "F6")):  # which torch cannot hold
            assert TensorFiles(tensors).read(name).shape == info.shape
    for infos in by_file.values():
        infos.sort(key=lambda t: (t.start, t.end))
        assert all(a.end <= b.start for a, b in pairwise(infos))
    build_header([(t.name, t.dtype, t.shape) for t in tensors.values()], {})


@harness(300, content=files())
def test_safetensors_header(content: bytes) -> None:
    """What is accepted is what the safetensors library accepts, with the same tensors."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(content)
        header = attempt(folder, lambda: read_header(folder / "model.safetensors"))
        checkpoint = attempt(folder, lambda: open_checkpoint(folder))
        assert isinstance(header, ShardHeader) == isinstance(checkpoint, Checkpoint)
        if isinstance(header, LoraExportError) or isinstance(checkpoint, LoraExportError):
            return
        assert checkpoint.tensors == header.tensors and checkpoint.metadata == header.metadata
        check_ranges(header.tensors)
        theirs = load(content)
        assert {n: tuple(t.shape) for n, t in theirs.items()} == {n: t.shape for n, t in header.tensors.items()}


SHARDS = {
    "one.safetensors": save({"a": torch.ones(2), "b": torch.ones(3)}),
    "two.safetensors": save({"c": torch.ones(2)}),
}
INDEX = {
    "metadata": {"total_size": 28},
    "weight_map": {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"},
}
NAMES = ("a", "b", "c", "one.safetensors", "two.safetensors", "weight_map", "../two.safetensors", "x" * 300)


@harness(
    200,
    index=json_files(INDEX, NAMES),
    config=st.just(b"{}") | json_files({"model_type": "llama", "text_config": {"auto_map": None}}),
    shard=st.just(SHARDS["two.safetensors"]) | damaged_bytes(SHARDS["two.safetensors"]),
)
def test_index_and_shards(index: bytes, config: bytes, shard: bytes) -> None:
    """What is accepted has each tensor in the shard that the index names, and no other."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "base")
        folder.mkdir()
        (Path(name) / "two.safetensors").write_bytes(SHARDS["two.safetensors"])
        (folder / "one.safetensors").write_bytes(SHARDS["one.safetensors"])
        (folder / "two.safetensors").write_bytes(shard)
        (folder / "config.json").write_bytes(config)
        (folder / "model.safetensors.index.json").write_bytes(index)
        checkpoint = attempt(folder, lambda: open_checkpoint(folder))
        if isinstance(checkpoint, LoraExportError):
            return
        check_ranges(dict(checkpoint.tensors))
        assert {n: t.file.name for n, t in checkpoint.tensors.items()} == json.loads(index)["weight_map"]
        assert all(t.file.parent == folder for t in checkpoint.tensors.values())
