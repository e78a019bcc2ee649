"""Every type that safetensors writes is read: its size, its values where torch has the type, and in a merge."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_export.checkpoint import TensorFiles
from lora_export.checkpoint.header import build_header, read_header
from lora_export.contracts.tensors import file_dtype
from lora_export.errors import CheckpointError
from lora_export.merging import merge
from tests.builders import edit_tensors, save_base

TYPES = (
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu",
    "float8_e4m3fnuz", "float8_e5m2fnuz", "complex64", "int64", "int32", "int16", "int8", "uint64", "uint32",
    "uint16", "uint8", "bool",
)  # fmt: skip


@pytest.mark.parametrize("name", TYPES)
def test_read_header_type_of_torch_gives_its_values(tmp_path: Path, name: str) -> None:
    value = torch.arange(48, dtype=torch.uint8).reshape(3, 16) % 2
    value = value.view(getattr(torch, name)) if name != "bool" else value.bool()
    save_file({"x": value}, tmp_path / "x.safetensors")
    info = read_header(tmp_path / "x.safetensors").tensors["x"]
    assert (info.dtype, info.shape, info.nbytes) == (file_dtype(name), tuple(value.shape), 48)
    assert TensorFiles({"x": info}).read("x").view(torch.uint8).equal(value.view(torch.uint8))
    assert (tmp_path / "x.safetensors").read_bytes().startswith(build_header([("x", info.dtype, info.shape)], {}))


@pytest.mark.parametrize(("dtype", "bits"), [("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6)])
def test_read_header_type_of_less_than_a_byte_is_counted_in_bits(tmp_path: Path, dtype: str, bits: int) -> None:
    def read(shape: tuple[int, ...], nbytes: int) -> TensorFiles:
        entry = {"dtype": dtype, "shape": list(shape), "data_offsets": [0, nbytes]}
        text = json.dumps({"x": entry}).encode()
        (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + bytes(nbytes))
        return TensorFiles(read_header(tmp_path / "x").tensors)

    source = read((3, 8), 3 * bits)
    assert source.tensors["x"].nbytes == 3 * bits
    with pytest.raises(CheckpointError, match=f"torch has no type for {dtype}"):
        source.read("x")
    with pytest.raises(CheckpointError, match=r"which needs \d+ and \d bits"):
        read((3, 3), 9 * bits // 8)


def test_merge_complex_tensor_is_copied(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    value = torch.complex(torch.randn(4), torch.randn(4))
    edit_tensors(base / "model.safetensors", {"model.rotary": value})
    merge(base, [], tmp_path / "out")
    info = read_header(tmp_path / "out" / "model.safetensors").tensors["model.rotary"]
    assert TensorFiles({"x": info}).read("x").equal(value)
