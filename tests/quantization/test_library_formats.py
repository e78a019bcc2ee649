"""Formats of other libraries: what is refused, by name, and what no library could make here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora_export.checkpoint import open_checkpoint
from lora_export.errors import CheckpointError, InputError
from lora_export.quantization import QuantizedWeight, find_quantized
from tests.builders import edit_json, tensors
from tests.quantization.packing import Tensors, integers, scales
from tests.quantization.test_samples import SAMPLES, WEIGHT, opened

MODULE = WEIGHT.removesuffix(".weight")


def test_torchao_plain_int4_matches(tmp_path: Path) -> None:
    """Its kernels need a GPU; by the description: signed nibbles, the first in the lowest bits, + zero."""
    rows, columns, size = 24, 128, 32
    codes = integers(-8, 8, rows, columns)
    scale, zero = (
        scales(columns // size, rows, dtype=torch.bfloat16),
        scales(columns // size, rows).bfloat16() - 0.02,
    )
    owner = torch.arange(columns) // size
    exact = codes.double() * scale.T.double()[:, owner] + zero.T.double()[:, owner]
    packed = ((codes[:, 1::2] & 15) << 4 | (codes[:, ::2] & 15)).to(torch.uint8)
    values = {"qdata": packed.view(torch.int8), "scale": scale, "zero_point": zero}
    told = {"_type": "Int4Tensor", "_data": {"block_size": [1, size], "shape": [rows, columns]}}
    told |= {"_tensor_data_names": list(values)}
    metadata = {"w.weight": json.dumps(told), "tensor_names": '["w.weight"]'}
    save_file({f"w._weight_{k}": v for k, v in values.items()}, tmp_path / "model.safetensors", metadata)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "torchao"}}')
    checkpoint = open_checkpoint(tmp_path)
    (weight,) = find_quantized(checkpoint, checkpoint.config).values()
    assert weight.dtype == "BF16" and set(weight.parts) == set(checkpoint.tensors)
    found = weight.load(checkpoint).rows(0, rows)
    torch.testing.assert_close(found.double(), exact, rtol=2.0**-23, atol=2.0**-28)
    assert torch.equal(weight.load(checkpoint).rows(7, 15), found[7:15])


def changed(
    sample: str,
    folder: Path,
    change: Callable[[Tensors], Any],
    metadata: dict[str, str] | None = None,
    **config: Any,
) -> dict[str, QuantizedWeight]:
    """What is found in a sample after a change of its tensors, its metadata or its config.json."""
    checkpoint, _ = opened(next(s for s in SAMPLES if s.stem == sample), folder)
    values = tensors(folder)
    change(values)
    save_file(values, folder / "model.safetensors", metadata or dict(checkpoint.metadata))
    edit_json(folder / "config.json", **config)
    checkpoint = open_checkpoint(folder)
    return find_quantized(checkpoint, checkpoint.config)


def without(name: str) -> Callable[[Tensors], Any]:
    return lambda values: values.pop(f"{MODULE}.{name}")


def put(name: str, value: torch.Tensor) -> Callable[[Tensors], Any]:
    return lambda values: values.update({f"{MODULE}.{name}": value})


def text(value: str) -> torch.Tensor:
    return torch.tensor(list(value.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("sample", "change", "told"),
    [
        ("hqq-4-axis1", without("zero"), r"down_proj\.zero is missing"),
        ("hqq-4-axis1", put("packing", text("5bit_u8")), "HQQ packed as '5bit_u8' along axis 1"),
        ("hqq-4-axis1", put("axis", torch.tensor(2, dtype=torch.int32)), "along axis 2"),
        ("hqq-4-axis1", put("shape", torch.tensor([16, 255])), "64 groups for a weight of 16 × 255"),
        ("hqq-4-axis1", put("shape", torch.tensor([16, 512])), r"the shape is \[32, 64\]"),
        ("quanto-qint4", without("weight._shift"), r"_shift is missing"),
        ("quanto-qint4", put("weight._data._data", torch.zeros(5, 128, dtype=torch.uint8)), "5 × 128 bytes"),
        ("quanto-qint8", put("weight._scale", torch.ones(3, 1)), r"scales of shape \[3, 1\]"),
        ("torchao-int8", put("_weight_scale", torch.ones(16, 2)), r"scales of shape \[16, 2\]"),
        ("mlx-4-64", without("biases"), r"down_proj\.biases is missing"),
        ("mlx-4-64", put("scales", torch.ones(16, 3)), r"the shape is \[16, 4\]|the shape is \[16, 3\]"),
        ("mlx-mxfp4", put("scales", torch.ones(16, 8)), "the type is F32"),
    ],
)
def test_library_formats_damaged_parts_are_named(
    tmp_path: Path, sample: str, change: Callable[[Tensors], Any], told: str
) -> None:
    with pytest.raises(CheckpointError, match=told):
        changed(sample, tmp_path, change)


def nothing(_: Tensors) -> None:
    pass


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"model_type": "qwen3_next"}, "MLX folder of the architecture 'qwen3_next'"),
        ({"quantization": {"group_size": 64, "bits": 7}}, "7 bits in groups of 64"),
        ({"quantization": {"group_size": 64, "bits": 4, "mode": "other"}}, "mode 'other'"),
        ({"quantization": {"group_size": 32, "bits": 4, "mode": "nvfp4"}}, "the type is F32"),
    ],
)
def test_mlx_unsupported_folder_is_refused(tmp_path: Path, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        changed("mlx-4-64", tmp_path, nothing, **settings)


def test_mlx_layer_settings_are_applied(tmp_path: Path) -> None:
    own = {"group_size": 32, "bits": 8, MODULE: {"group_size": 64, "bits": 4}}
    assert set(changed("mlx-4-64", tmp_path, nothing, quantization=own, quantization_config=own)) == {WEIGHT}


@pytest.mark.parametrize(
    ("told", "error", "match"),
    [
        (
            {"_type": "Int4TilePackedTo4dTensor", "_data": {"block_size": [1, 32]}},
            CheckpointError,
            "one kind of device",
        ),
        (
            {"_type": "Int8Tensor", "_data": {"block_size": [1, 256]}, "_tensor_data_names": ["act_pre_scale"]},
            CheckpointError,
            "with scaled inputs",
        ),
        (
            {"_type": "Int8Tensor", "_data": {"block_size": [1, 1, 256]}},
            CheckpointError,
            r"in blocks of \[1, 1, 256\]",
        ),
        ({"_type": "Int8Tensor", "_data": {"block_size": "x"}}, InputError, "torchao's metadata is damaged"),
        ({"_type": "Tensor"}, CheckpointError, "no quantized weight is here"),
    ],
)
def test_torchao_metadata_is_read(tmp_path: Path, told: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        changed("torchao-int8", tmp_path, nothing, {WEIGHT: json.dumps(told)})


def test_torchao_invalid_metadata_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not JSON"):
        changed("torchao-int8", tmp_path, nothing, {WEIGHT: '{"_type"'})
