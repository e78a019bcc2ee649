"""Formats whose own library runs on a CPU: what it quantized and stored is read bit for bit as it reads it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file

from lora_export.checkpoint import open_checkpoint
from lora_export.quantization import find_quantized
from tests.builders import edit_json, edit_tensors, save_base, tensors
from tests.quantization.packing import scales


def grids(weight: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of each row and group (or block, or the tensor), by the library's own rule."""
    rows, columns = weight.shape
    height, width = {
        "tensor": (rows, columns),
        "channel": (1, columns),
        "group": (1, args.group_size),
        "block": tuple(args.block_structure or (0, 0)),
    }[str(args.strategy)]
    blocks = weight.reshape(rows // height, height, columns // width, width)
    scale, zero = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), args)
    if args.strategy == "tensor":
        return scale.reshape(1), zero.reshape(1)
    return scale, zero


CASES: list[tuple[str, dict[str, Any]]] = [
    *(
        ("pack-quantized", {"num_bits": bits, "symmetric": symmetric, "strategy": "group", "group_size": group})
        for bits in (4, 8)
        for symmetric in (True, False)
        for group in (32, 64, 128)
    ),
    *(("pack-quantized", {"num_bits": bits, "symmetric": True, "strategy": "channel"}) for bits in (4, 8)),
    ("pack-quantized", {"num_bits": 4, "symmetric": False, "strategy": "channel"}),
    ("int-quantized", {"num_bits": 8, "symmetric": True, "strategy": "channel"}),
    ("int-quantized", {"num_bits": 8, "symmetric": False, "strategy": "channel"}),
    ("int-quantized", {"num_bits": 8, "symmetric": True, "strategy": "tensor"}),
    ("float-quantized", {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}),
    ("float-quantized", {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}),
    ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]}),
    ("naive-quantized", {"num_bits": 8, "symmetric": True, "strategy": "group", "group_size": 32}),
]


@pytest.mark.parametrize(
    ("form", "settings"), CASES, ids=[f"{f} {' '.join(map(str, s.values()))}" for f, s in CASES]
)
def test_compressed_tensors_matches_library(tmp_path: Path, form: str, settings: dict[str, Any]) -> None:
    args = QuantizationArgs(**settings)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(3)) * 0.05
    scale, zero = grids(weight, args)
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress({"weight": weight, "weight_scale": scale, "weight_zero_point": zero}, scheme)
    if form != "pack-quantized" and args.symmetric:
        stored.pop("weight_zero_point", None)
    expected = compressor.decompress(dict(stored), scheme)["weight"]
    save_file({f"w.{k}": v.contiguous() for k, v in stored.items()}, tmp_path / "model.safetensors")
    group = {"weights": args.model_dump(mode="json"), "targets": ["Linear"]}
    (tmp_path / "config.json").write_text("{}")
    edit_json(
        tmp_path / "config.json",
        quantization_config={
            "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
        },
    )  # fmt: skip
    checkpoint = open_checkpoint(tmp_path)
    found = find_quantized(checkpoint, checkpoint.config)["w.weight"]
    assert set(found.parts) == set(checkpoint.tensors)
    assert torch.equal(found.load(checkpoint).rows(0, 48), expected)
    assert float((expected - weight).abs().max()) < 0.03  # it is this weight that was quantized


@pytest.mark.parametrize("block", [(8, 16), (4, 8)])
def test_fp8_matches_transformers(tmp_path: Path, block: tuple[int, int]) -> None:
    """Blocks that divide every weight: transformers 5.23 spreads short ones over the weight, or refuses them."""
    base = save_base(tmp_path / "base")
    changes: dict[str, torch.Tensor | None] = {}
    for name, weight in tensors(base).items():
        if name.endswith("_proj.weight"):
            grid = tuple(-(-n // b) for n, b in zip(weight.shape, block, strict=True))
            changes[name] = (weight * 20).to(torch.float8_e4m3fn)
            changes[f"{name}_scale_inv"] = scales(*grid, dtype=torch.float32)
    edit_tensors(base / "model.safetensors", changes)
    settings = {"quant_method": "fp8", "weight_block_size": list(block), "dequantize": True}
    edit_json(base / "config.json", quantization_config=settings)
    checkpoint = open_checkpoint(base)
    found = find_quantized(checkpoint, checkpoint.config)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert len(found) == 14
    for name, weight in found.items():
        expected = model.get_parameter(name).data
        assert expected.dtype == torch.float32
        assert torch.equal(weight.load(checkpoint).rows(0, weight.shape[0]), expected), name
