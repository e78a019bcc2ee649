"""MXFP4, NVFP4, MXFP8, fp8 in all its spellings: read to a bit as the format's own library reads them, where that
runs on a CPU, and within two roundings of float64 written from the format's description."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lora_export.checkpoint import TensorFiles
from lora_export.checkpoint.header import read_header
from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.errors import CheckpointError
from lora_export.merging import merge
from lora_export.quantization import QuantizedWeight, find_quantized
from lora_export.workflows.inspection import inspect_folder
from tests.builders import edit_json, edit_tensors, load, logits, save_adapter, save_base, tensors, unmerged
from tests.quantization.floats import blocks, fp4, fp8, spread
from tests.quantization.packing import Tensors, scales

FP8 = {"quant_method": "fp8"}
COMPRESSED = {"quant_method": "compressed-tensors"}
MODELOPT = {"quant_method": "modelopt"}


def found(folder: Path, values: Tensors, settings: dict[str, Any]) -> tuple[QuantizedWeight, TensorFiles]:
    """The only quantized weight, of which every tensor is a part."""
    save_file({k: v.contiguous() for k, v in values.items()}, folder / "model.safetensors")
    source = TensorFiles(read_header(folder / "model.safetensors").tensors)
    (weight,) = find_quantized(source, {"quantization_config": settings, "dtype": "bfloat16"}).values()
    assert set(weight.parts) == set(values) and weight.dtype == "BF16"
    return weight, source


def whole(folder: Path, values: Tensors, settings: dict[str, Any]) -> torch.Tensor:
    """All rows, which are the same in blocks that begin and end anywhere."""
    weight, source = found(folder, values, settings)
    rows = weight.load(source)
    everything = rows.rows(0, weight.shape[0])
    assert everything.dtype == torch.float32 and tuple(everything.shape) == weight.shape
    middle = weight.shape[0] // 2
    for start, stop in ((0, 1), (middle, middle + 1), (1, weight.shape[0])):
        assert torch.equal(rows.rows(start, stop), everything[start:stop])
    return everything


def check(folder: Path, values: Tensors, exact: torch.Tensor, settings: dict[str, Any]) -> None:
    torch.testing.assert_close(whole(folder, values, settings).double(), exact, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize(("low", "high"), [(118, 126), (0, 40), (215, 253)])
def test_mxfp4_matches_transformers(tmp_path: Path, low: int, high: int) -> None:
    """Also where bfloat16 has subnormal numbers, and just below where it ends."""
    parts, exact = blocks(3, 40, 96, low, high)
    values = {"e.down_proj_blocks": parts["blocks"], "e.down_proj_scales": parts["scales"]}
    settings = {"quant_method": "mxfp4"}
    check(tmp_path, values, exact, settings)
    expected = convert_moe_packed_tensors(parts["blocks"], parts["scales"])
    assert torch.equal(whole(tmp_path, values, settings).bfloat16(), expected)


def test_mxfp4_long_rows_are_unpacked_in_pieces(tmp_path: Path) -> None:
    parts, exact = blocks(2, 4100, 320)
    check(tmp_path, {"w_blocks": parts["blocks"], "w_scales": parts["scales"]}, exact, {"quant_method": "mxfp4"})


@pytest.mark.parametrize("form", ["nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"])
def test_compressed_float_formats_match_definition(tmp_path: Path, form: str) -> None:
    """To a bit, once it is rounded to the type that the library gives."""
    args: dict[str, Any] = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group"}
    args |= {"group_size": 32, "scale_dtype": torch.uint8}
    if form == "mxfp8-quantized":
        made, exact = fp8((24, 64), (24, 2), power=True)
        stored, args = {"weight": made["codes"], "weight_scale": made["scale"]}, args | {"num_bits": 8}
    else:
        group = 16 if form.startswith("nv") else 32
        made, exact = fp4(24, 64, group=group)
        stored = {"weight_packed": made["packed"], "weight_scale": made["scale"]}
        if group == 16:
            stored["weight_global_scale"] = torch.tensor([437.5])
            args |= {"strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn}
            exact = exact / 437.5
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    expected = BaseCompressor.get_value_from_registry(form).decompress(dict(stored), scheme)["weight"]
    values = {f"w.{k}": v for k, v in stored.items()}
    settings = COMPRESSED | {"format": form}
    check(tmp_path, values, exact, settings)
    assert torch.equal(whole(tmp_path, values, settings).to(expected.dtype), expected)


@pytest.mark.parametrize(
    ("shape", "grid"),
    [
        ((24, 48), ()),
        ((24, 48), (24, 1)),
        ((24, 48), (3, 1, 2, 1)),
        ((24, 64), (24, 2)),
    ],
    ids=["tensor", "rows", "blocks", "mx"],
)
def test_modelopt_fp8_matches_definition(tmp_path: Path, shape: tuple[int, int], grid: tuple[int, ...]) -> None:
    plain = grid[::2] if len(grid) == 4 else grid or (1, 1)
    made, exact = fp8(shape, plain, power=grid == (24, 2))
    values = {"w.weight": made["codes"], "w.weight_scale": made["scale"].reshape(grid)}
    check(tmp_path, values, exact, MODELOPT)


def test_modelopt_nvfp4_matches_definition(tmp_path: Path) -> None:
    made, exact = fp4(24, 64, whole=0.0123)
    second = torch.tensor(0.0123)
    values = {"w.weight": made["packed"], "w.weight_scale": made["scale"], "w.weight_scale_2": second}
    check(tmp_path, values, exact / 0.0123 * second.double(), MODELOPT)


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale", "scale", "qscale_weight", "weight.scale"])
@pytest.mark.parametrize("numbers", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_scale_names_are_recognized(tmp_path: Path, name: str, numbers: torch.dtype) -> None:
    made, exact = fp8((32, 64), (2, 2), numbers)
    settings = FP8 | {"weight_block_size": [16, 32]}
    check(tmp_path, {"w.weight": made["codes"], f"w.{name}": made["scale"]}, exact, settings)


@pytest.mark.parametrize(
    ("grid", "block"),
    [
        ((3, 2, 2), [16, 32]), ((3, 2, 2), None), ((3, 1, 64), None), ((3, 32, 1), None), ((3, 1, 1), None),
        ((1, 1, 1), None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["_scale_inv", "_scale"])
def test_fp8_fused_experts_match_definition(
    tmp_path: Path, grid: tuple[int, ...], block: list[int] | None, name: str
) -> None:
    made, _ = fp8((3, 32, 64), (3, 1, 1))
    scale = scales(*grid, dtype=torch.float32)
    exact = made["codes"].double() * spread(scale, (3, 32, 64))
    values = {"e.gate_up_proj": made["codes"], f"e.gate_up_proj{name}": scale}
    check(tmp_path, values, exact, FP8 | {"weight_block_size": block})


def test_compressed_fused_experts_match_definition(tmp_path: Path) -> None:
    made, exact = fp8((3, 32, 64), (3, 32, 1))
    values = {"moe.input_linear.weight": made["codes"], "moe.input_linear.weight_scale": made["scale"]}
    check(tmp_path, values, exact, COMPRESSED | {"format": "float-quantized"})


@pytest.mark.parametrize("case", ["bytes as exponents", "two in a byte", "fbgemm"])
def test_fp8_matches_transformers_dequantization(tmp_path: Path, case: str) -> None:
    if case == "two in a byte":  # DeepSeek V4's experts
        made, exact = fp4(24, 64, group=32, kind=torch.int8)
        codes, scale = made["packed"], made["scale"].view(torch.float8_e8m0fnu)
    else:
        made, exact = fp8((24, 64), (24, 2) if case == "bytes as exponents" else (24, 1), power=case != "fbgemm")
        codes, scale = made["codes"], made["scale"]
    method = "mxfp8" if case == "bytes as exponents" else "fbgemm_fp8" if case == "fbgemm" else "fp8"
    values = {"w.weight": codes, "w.weight_scale": scale}
    check(tmp_path, values, exact, {"quant_method": method})
    expected = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32)
    assert torch.equal(whole(tmp_path, values, {"quant_method": method}), expected)


WRONG: list[tuple[str, Tensors, dict[str, Any], str]] = [
    ("grid", {"w.weight": fp8((24, 64), (1, 1))[0]["codes"], "w.weight_scale_inv": torch.ones(5, 2)}, FP8, "5, 2"),
    (
        "blocks",
        {"w.weight": fp8((24, 64), (1, 1))[0]["codes"], "w.weight_scale_inv": torch.ones(2, 3)},
        FP8 | {"weight_block_size": [16, 32]},
        r"blocks of 16 × 32",
    ),
    (
        "four dimensions",
        {"w.weight": torch.zeros(2, 2, 2, 2).to(torch.float8_e4m3fn), "w.weight_scale_inv": torch.ones(1)},
        FP8,
        "2 dimensions, or 3",
    ),
    (
        "groups",
        {"w.weight_packed": torch.zeros(8, 32, dtype=torch.uint8), "w.weight_scale": torch.zeros(8, 3).byte()},
        COMPRESSED | {"format": "mxfp4-pack-quantized"},
        r"\[8, 3\] for \[8, 32\] bytes",
    ),
    ("no scale", {"w.weight_packed": torch.zeros(8, 32).byte()}, COMPRESSED, "w.weight_scale is missing"),
    (
        "width",
        {"w_blocks": torch.zeros(2, 4, 3, 8).byte(), "w_scales": torch.zeros(2, 4, 3).byte()},
        {"quant_method": "mxfp4"},
        r"\[2, 4, 3, 8\]",
    ),
    (
        "inputs scaled before",
        {
            "w.weight": torch.zeros(8, 32).byte(),
            "w.weight_scale": torch.ones(8, 4).to(torch.float8_e4m3fn),
            "w.pre_quant_scale": torch.ones(64),
        },
        MODELOPT,
        "pre_quant_scale",
    ),
]


@pytest.mark.parametrize(("values", "settings", "told"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_floating_formats_unfitting_parts_are_refused(
    tmp_path: Path, values: Tensors, settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(CheckpointError) as refused:
        found(tmp_path, values, settings)
    assert any(
        told.replace("\\", "") in str(text)
        for text in (refused.value.found, refused.value.expected, refused.value.tensor)
    )


def gpt_oss(folder: Path) -> Path:
    """Two layers, experts in MXFP4, everything else in bfloat16."""
    config = transformers.GptOssConfig(
        vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=128,
        sliding_window=16, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    save_base(folder, transformers.GptOssForCausalLM, config, torch.bfloat16)
    changes: dict[str, torch.Tensor | None] = {}
    for name, value in tensors(folder).items():
        if name.endswith(("gate_up_proj", "down_proj")):
            parts, _ = blocks(value.shape[0], value.shape[2], value.shape[1], 119, 123)
            changes |= {name: None, f"{name}_blocks": parts["blocks"], f"{name}_scales": parts["scales"]}
    edit_tensors(folder / "model.safetensors", changes)
    edit_json(folder / "config.json", quantization_config={"quant_method": "mxfp4"})
    return folder


def test_gpt_oss_merge_equals_unmerged(tmp_path: Path) -> None:
    """Against PEFT on the base as transformers itself dequantizes it."""
    cls = transformers.GptOssForCausalLM
    base = gpt_oss(tmp_path / "base")
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=6, lora_alpha=15, target_modules=["q_proj", "o_proj"], target_parameters=experts)
    adapter = save_adapter(tmp_path / "adapter", base, config, cls)
    result = merge(base, [AdapterChoice(adapter)], tmp_path / "out", MergeOptions(dtype="float32"))
    assert result.tensors["updated"] == 8 and result.tensors["dequantized"] == 0
    assert set(tensors(tmp_path / "out")) == set(load(base, cls).state_dict())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    expected = logits(unmerged(base, adapter, cls))
    off = (logits(load(tmp_path / "out", cls)) - expected).abs().max()
    assert float(off) < 1e-5 * float(expected.abs().max())


def test_gpt_oss_without_adapter_is_dequantized_exactly(tmp_path: Path) -> None:
    base = gpt_oss(tmp_path / "base")
    merge(base, [], tmp_path / "out")
    model = transformers.GptOssForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    written = tensors(tmp_path / "out")
    assert written.keys() == model.state_dict().keys()
    assert all(torch.equal(written[n], v) for n, v in model.state_dict().items())
    told = inspect_folder(base)
    assert told["quantization"] == "mxfp4" and told["parameters"] == sum(p.numel() for p in model.parameters())


def test_quantization_settings_of_config_part_are_removed(tmp_path: Path) -> None:
    """A model that sees says both in text_config: its weights come out in that type, and no settings stay."""
    made, exact = fp8((32, 64), (1, 1))
    values = {"m.q_proj.weight": made["codes"], "m.q_proj.weight_scale_inv": made["scale"].reshape(())}
    values |= {"m.k_proj.k_scale": torch.ones(()), "m.norm.weight": torch.ones(8, dtype=torch.bfloat16)}
    base = tmp_path / "base"
    base.mkdir()
    save_file(values, base / "model.safetensors")
    text = {"dtype": "bfloat16", "quantization_config": FP8, "hidden_size": 64}
    (base / "config.json").write_text(json.dumps({"model_type": "odd", "text_config": text, "vision_config": {}}))
    result = merge(base, [], tmp_path / "out")
    written = tensors(tmp_path / "out")
    assert written["m.q_proj.weight"].dtype == torch.bfloat16 and result.dtype == "bfloat16"
    assert torch.equal(written["m.q_proj.weight"], exact.bfloat16())
    assert set(written) == {"m.q_proj.weight", "m.norm.weight"}
    assert any("k_scale" in w for w in result.warnings)
    left = json.loads((tmp_path / "out" / "config.json").read_text())
    assert left["text_config"] == {"dtype": "bfloat16", "hidden_size": 64} and left["vision_config"] == {}


def test_modelopt_settings_file_is_enough(tmp_path: Path) -> None:
    made, exact = fp4(24, 64, whole=0.5)
    values = {"w.weight": made["packed"], "w.weight_scale": made["scale"], "w.weight_scale_2": torch.tensor([0.5])}
    values |= {"w.input_scale": torch.ones(()), "n.weight": torch.ones(3, dtype=torch.float16)}
    base = tmp_path / "base"
    base.mkdir()
    save_file(values, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"model_type": "odd"}))
    settings = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (base / "hf_quant_config.json").write_text(json.dumps(settings))
    assert inspect_folder(base)["quantization"] == "modelopt NVFP4"
    merge(base, [], tmp_path / "out")
    assert set(tensors(tmp_path / "out")) == {"w.weight", "n.weight"}
    assert torch.equal(tensors(tmp_path / "out")["w.weight"], exact.half())  # the type of what is not quantized
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()


def test_fp8_merge_equals_unmerged(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    changes: dict[str, torch.Tensor | None] = {}
    for name, weight in tensors(base).items():
        if name.endswith("_proj.weight"):
            changes[name] = (weight * 20).to(torch.float8_e4m3fn)
            changes[name.replace("weight", "scale")] = torch.full((), 0.05)
            changes[name.replace("weight", "activation_scale")] = torch.full((), 0.1)
    edit_tensors(base / "model.safetensors", changes)
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text((base / "config.json").read_text())
    by_hand = {n: v.float() * (0.05 if v.dtype == torch.float8_e4m3fn else 1) for n, v in tensors(base).items()}
    save_file({n: v for n, v in by_hand.items() if not n.endswith("scale")}, plain / "model.safetensors")
    edit_json(base / "config.json", quantization_config=FP8 | {"activation_scheme": "static"})
    config = peft.LoraConfig(r=6, lora_alpha=15, target_modules=["q_proj", "gate_proj"])
    adapter = save_adapter(tmp_path / "adapter", plain, config)
    result = merge(base, [AdapterChoice(adapter)], tmp_path / "out", MergeOptions(dtype="float32"))
    assert set(tensors(tmp_path / "out")) == set(tensors(plain))
    assert any("activation_scale" in w for w in result.warnings)
    expected = logits(unmerged(plain, adapter))
    assert float((logits(load(tmp_path / "out")) - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_mxfp4_experts_merge_in_bounded_memory(tmp_path: Path) -> None:
    """All 16 experts together would take more than is allowed, in fp32 and as they are stored."""
    parts, exact = blocks(16, 512, 512)
    base = tmp_path / "base"
    base.mkdir()
    save_file({"w_blocks": parts["blocks"], "w_scales": parts["scales"]}, base / "model.safetensors")
    (base / "config.json").write_text(
        json.dumps({"dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4"}})
    )
    merge(base, [], tmp_path / "out", MergeOptions(max_memory=4 * 512 * 512 * 4))
    assert torch.equal(tensors(tmp_path / "out")["w"], exact.bfloat16())
