"""GPTQ, AWQ, fp8 and compressed-tensors weights are read back as the float64 values that they were packed from."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora_export.checkpoint import TensorFiles, open_checkpoint
from lora_export.checkpoint.header import read_header
from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.errors import CheckpointError
from lora_export.merging import merge
from lora_export.quantization import QuantizedWeight, describe, find_quantized
from tests.builders import edit_json, edit_tensors, load, logits, lora, save_adapter, save_base, tensors, unmerged
from tests.quantization.packing import Tensors, awq, fp8, gptq, integers, packed, plain


def quantized(folder: Path, values: Tensors, settings: dict[str, Any]) -> tuple[QuantizedWeight, TensorFiles]:
    save_file(values, folder / "model.safetensors")
    source = TensorFiles(read_header(folder / "model.safetensors").tensors)
    (weight,) = find_quantized(source, {"quantization_config": settings, "dtype": "bfloat16"}).values()
    return weight, source


def check(folder: Path, made: tuple[Tensors, torch.Tensor], settings: dict[str, Any]) -> QuantizedWeight:
    """All rows at once, and in blocks that begin and end anywhere, are the exact weight rounded to fp32 twice."""
    values, exact = made
    weight, source = quantized(folder, values, settings)
    assert weight.weight == "w.weight" and weight.shape == tuple(exact.shape)
    assert set(weight.parts) == set(values) and weight.parts[0] in source.tensors
    rows = weight.load(source)
    whole = rows.rows(0, weight.shape[0])
    assert whole.dtype == torch.float32
    torch.testing.assert_close(whole.double(), exact, rtol=2.0**-23, atol=0)
    for start, stop in ((0, 1), (3, min(10, len(whole))), (len(whole) - 1, len(whole))):
        assert torch.equal(rows.rows(start, stop), whole[start:stop])
    return weight


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("v2", [False, True])
def test_gptq_matches_definition(tmp_path: Path, bits: int, group: int, act_order: bool, v2: bool) -> None:
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group}
    settings |= {"checkpoint_format": "gptq_v2"} if v2 else {}
    found = check(tmp_path, gptq(64, 256, bits, group, act_order, v2), settings)
    assert found.dtype == "BF16"  # the model's, not that of the scales


def test_gptq_short_last_group_without_g_idx_matches(tmp_path: Path) -> None:
    values, exact = gptq(16, 96, 4, 64)
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 64}
    check(tmp_path, (values, exact), settings)
    del values["w.g_idx"]
    check(tmp_path, (values, exact), settings)


@pytest.mark.parametrize("key", ["dynamic", "extra_config"])
@pytest.mark.parametrize("g_idx", [True, False])
def test_gptq_dynamic_settings_are_applied(tmp_path: Path, key: str, g_idx: bool) -> None:
    """The shapes say what each module has: GPTQModel names them by expressions, AutoRound by their names."""
    values, exact = gptq(64, 256, 8, 64)
    if not g_idx:
        del values["w.g_idx"]
    own = {"quant_method": "auto-round"} if key == "extra_config" else {"quant_method": "gptq"}
    own |= {"bits": 4, "group_size": 32, key: {r"+:w": {"bits": 8, "group_size": 64}}}
    check(tmp_path, (values, exact), own)
    with pytest.raises(CheckpointError):
        quantized(tmp_path, values, own | {key: {}})


@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("zero_point", [True, False])
def test_awq_matches_definition(tmp_path: Path, group: int, zero_point: bool) -> None:
    settings = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": zero_point}
    check(tmp_path, awq(48, 256, group), settings)


@pytest.mark.parametrize("shape", [(48, 96), (37, 81), (16, 32), (5, 7)])
def test_fp8_blocks_match_definition(tmp_path: Path, shape: tuple[int, int]) -> None:
    check(tmp_path, fp8(*shape), {"quant_method": "fp8", "weight_block_size": [16, 32]})


def test_fp8_power_of_two_scales_match(tmp_path: Path) -> None:
    """DeepSeek's scale_fmt ue8m0: eight bits of exponent and nothing else."""
    values, _ = fp8(48, 96)
    values["w.weight_scale_inv"] = values["w.weight_scale_inv"].to(torch.float8_e8m0fnu)
    spread = values["w.weight_scale_inv"].double().repeat_interleave(16, 0).repeat_interleave(32, 1)
    check(
        tmp_path,
        (values, values["w.weight"].double() * spread),
        {"quant_method": "fp8", "weight_block_size": [16, 32]},
    )


def test_fp8_single_scale_matches(tmp_path: Path) -> None:
    found = check(tmp_path, fp8(12, 20, None), {"quant_method": "fp8", "weight_block_size": None})
    assert found.dtype == "BF16"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group", "act_order"), [(32, False), (32, True), (64, False), (128, False)])
def test_compressed_packed_matches_definition(
    tmp_path: Path, bits: int, symmetric: bool, group: int, act_order: bool
) -> None:
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}
    check(tmp_path, packed(40, 128, bits, group, symmetric, act_order), settings)


@pytest.mark.parametrize(
    ("kind", "grid", "block", "zero"),
    [
        ("I8", (24, 1), (1, 40), False),
        ("I8", (24, 1), (1, 40), True),
        ("I8", (1,), (24, 40), False),
        ("F8", (24, 1), (1, 40), False),
        ("F8", (1,), (24, 40), False),
        ("F8", (24,), (1, 40), False),
        ("F8", (2, 3), (16, 16), False),
        ("I8", (24, 5), (1, 8), False),
    ],
)
def test_compressed_plain_matches_definition(
    tmp_path: Path, kind: str, grid: tuple[int, ...], block: tuple[int, int], zero: bool
) -> None:
    codes = integers(-128, 128, 24, 40).to(torch.int8)
    if kind == "F8":
        codes = torch.randn(24, 40, generator=torch.Generator().manual_seed(4)).to(torch.float8_e4m3fn)
    weights = {"block_structure": [16, 16]} if block == (16, 16) else {}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if kind == "F8" else "int-quantized",
        "config_groups": {"group_0": {"weights": weights}},
    }
    check(tmp_path, plain(24, 40, codes, grid, block, zero), settings)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}


@pytest.mark.parametrize(
    ("change", "settings", "told"),
    [
        ({}, {"bits": 9}, "GPTQ with 9 bits"),
        ({}, {"group_size": 0}, "group_size is 0"),
        ({}, {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ({"w.qzeros": None}, {}, "w.qzeros is missing"),
        ({"w.scales": None}, {}, "w.scales is missing"),
        ({"w.scales": torch.ones(4, 16)}, {}, r"the shape is \[4, 16\]"),
        ({"w.qzeros": torch.ones(4, 6)}, {}, "the type is F32"),
        ({"w.g_idx": torch.zeros(9, dtype=torch.int32)}, {}, r"the shape is \[9\]"),
        ({"w.qweight": None}, {}, "no quantized weight is here"),
        ({}, {"quant_method": "aqlm"}, r"quantized with 'aqlm'.*\(AQLM: sums of codebook vectors"),
        ({}, {"quant_method": "eetq"}, r"quantized with 'eetq'.*permuted for the kernels"),
        ({}, {"quant_method": "something"}, "quantized with 'something', which this tool does not read\n"),
        ({}, {"quant_method": "auto-round", "packing_format": "auto_round:fake"}, "packed as 'auto_round:fake'"),
        ({}, {"quant_method": "auto-round", "rotation_config": {"a": 1}}, "with rotation_config, rotated weights"),
        ({"w.qzeros": torch.zeros(4, 7, dtype=torch.int32)}, {"dynamic": {"w": {}}}, r"zeros \[4, 7\]"),
        ({}, {"quant_method": "awq", "version": "gemv"}, "AWQ of version 'gemv'"),
        ({}, {"quant_method": "awq", "bits": 8}, "with 8 bits"),
        ({}, {"quant_method": "compressed-tensors", "format": "mxfp6-pack-quantized"}, "mxfp6-pack-quantized"),
        (
            {},
            {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"u": {}}}},
            "transform_config",
        ),
        ({}, {"quant_method": "compressed-tensors", "format": "marlin-24"}, "marlin-24"),
        ({}, {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24"}}, "with sparsity"),
    ],
)
def test_formats_refusals_name_finding(
    tmp_path: Path, change: dict[str, torch.Tensor | None], settings: dict[str, Any], told: str
) -> None:
    values = {k: v for k, v in (gptq(48, 128)[0] | change).items() if v is not None}
    with pytest.raises(CheckpointError, match=told):
        quantized(tmp_path, values, GPTQ | settings)


def test_gptq_missing_group_is_refused(tmp_path: Path) -> None:
    values, _ = gptq(48, 128)
    values["w.g_idx"][5] = 4
    weight, source = quantized(tmp_path, values, GPTQ)
    with pytest.raises(CheckpointError, match="a group beyond the 4"):
        weight.load(source)


def test_formats_are_described() -> None:
    assert describe(GPTQ | {"desc_act": True}) == "GPTQ 4 bits, groups of 32, act-order"
    assert describe({"quant_method": "fp8", "weight_block_size": [128, 128]}) == "fp8 in blocks of [128, 128]"
    assert describe({"quant_method": "compressed-tensors", "format": "pack-quantized"}).endswith("pack-quantized")
    assert describe({"load_in_8bit": True}) == "bitsandbytes int8"


def test_gptq_merge_equals_unmerged(tmp_path: Path) -> None:
    """Some layers packed, others plain: the merged model is the adapter on the dequantized weights."""
    base = save_base(tmp_path / "base", dtype=torch.float16)
    changes: dict[str, torch.Tensor | None] = {}
    exact: Tensors = {}
    for name, value in tensors(base).items():
        if name.endswith(("q_proj.weight", "up_proj.weight")):
            out, width = value.shape
            module = name.removesuffix(".weight")
            parts, weight = gptq(out, width, 4, 16, act_order=True, name=module)
            changes |= parts | {name: None}
            exact[name] = weight.float()
    plain_base = tmp_path / "plain"
    plain_base.mkdir()
    edit_tensors(base / "model.safetensors", changes)
    edit_json(base / "config.json", quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 16})
    source = open_checkpoint(base)
    found = find_quantized(source, source.config)
    for path in base.iterdir():
        (plain_base / path.name).write_bytes(path.read_bytes())
    dequantized = {n: w.load(source).rows(0, w.shape[0]) for n, w in found.items()}
    rest = {n: v.float() for n, v in tensors(base).items() if not any(n in w.parts for w in found.values())}
    save_file(rest | dequantized, plain_base / "model.safetensors", {"format": "pt"})
    edit_json(plain_base / "config.json", quantization_config=None)
    assert dequantized.keys() == exact.keys()
    for name, value in exact.items():
        torch.testing.assert_close(dequantized[name], value, rtol=1e-6, atol=0)
    adapter = save_adapter(tmp_path / "adapter", plain_base, lora())
    result = merge(base, [AdapterChoice(adapter)], tmp_path / "out", MergeOptions(dtype="float32"))
    assert result.tensors["dequantized"] == 2 and result.tensors["updated"] == 6
    assert set(tensors(tmp_path / "out")) == set(tensors(plain_base))
    expected = logits(unmerged(plain_base, adapter))
    assert float((logits(load(tmp_path / "out")) - expected).abs().max()) < 1e-5 * float(expected.abs().max())
