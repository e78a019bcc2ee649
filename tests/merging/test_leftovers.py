"""No quantized number leaves a base without its meaning, whatever the adapter touches; honest models stay whole."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.errors import CheckpointError
from lora_export.merging import merge, plan
from tests.builders import edit_json, edit_tensors, lora, save_adapter, save_base, tensors
from tests.quantization.packing import gptq

Change = Callable[[str, torch.Tensor], dict[str, torch.Tensor | None]]
FP8 = {"quant_method": "fp8"}


def fp8(name: str, weight: torch.Tensor) -> torch.Tensor:
    return (weight * 20).to(torch.float8_e4m3fn)


def scaled(scale: str) -> Change:
    """fp8 with a scale of such a name."""
    return lambda n, w: {n: fp8(n, w), n.replace("weight", scale): torch.full((), 0.05)}


def mixed(change: Change) -> Change:
    """fp8 as it should be in the second layer, this in the first."""
    return lambda n, w: change(n, w) if ".0." in n else scaled("weight_scale")(n, w)


def nvfp4(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor | None]:
    scale = fp8(name, weight[:, ::16])
    return {name: weight[:, ::2].byte(), f"{name}_scale": scale, f"{name}_scale_2": torch.ones(())}


CASES: dict[str, tuple[Change, dict[str, Any] | None, str]] = {
    "fp8 without settings": (scaled("weight_scale_inv"), None, "type F8_E4M3"),
    "fp8 without scales": (lambda n, w: {n: fp8(n, w)}, FP8, "no quantized weight is here"),
    "4-bit floats": (lambda n, w: {n: w[:, ::2].byte().view(torch.float4_e2m1fn_x2)}, None, "type F4"),
    "some fp8 without scales": (mixed(lambda n, w: {n: fp8(n, w)}), FP8, "type F8_E4M3"),
    "scales of an unknown name": (mixed(scaled("weight.odd")), FP8, "type F8_E4M3"),
    "a scale beside bfloat16": (mixed(lambda n, w: {f"{n}_scale": torch.ones(())}), FP8, "_proj.weight_scale"),
    "a second scale": (
        lambda n, w: scaled("weight_scale")(n, w) | {n.replace("weight", "outer_scale"): torch.ones(())},
        FP8, "outer_scale",
    ),
    "packed numbers": (mixed(lambda n, w: {n: None, f"{n}_packed": w[:, ::2].byte()}), FP8, "compressed-tensors"),
    "NVFP4 without settings": (nvfp4, None, "NVIDIA's Model Optimizer): type U8"),
    "GPTQ without settings": (
        lambda n, w: {n: None} | gptq(len(w), w.shape[1], name=n.removesuffix(".weight"))[0], None, "GPTQ or AWQ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_leftover_quantized_tensors_are_refused(tmp_path: Path, case: str) -> None:
    change, settings, told = CASES[case]
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base, lora(target_modules=["q_proj", "v_proj"]))
    changes: dict[str, torch.Tensor | None] = {}
    for name, weight in tensors(base).items():
        if "mlp" in name:
            changes |= change(name, weight)
    edit_tensors(base / "model.safetensors", changes)
    if settings:
        edit_json(base / "config.json", quantization_config=settings)
    with pytest.raises(CheckpointError) as refused:
        merge(base, [AdapterChoice(adapter)], tmp_path / "out")
    assert told in f"{refused.value.found} {refused.value.tensor}"
    assert "remove" not in str(refused.value.next_step) and not (tmp_path / "out").exists()


SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
HONEST: dict[str, tuple[type, Any]] = {
    "logit_scale": (
        transformers.CLIPModel,
        transformers.CLIPConfig(
            text_config=SMALL | {"intermediate_size": 24, "vocab_size": 50},
            vision_config=SMALL | {"intermediate_size": 24, "image_size": 8, "patch_size": 4},
        ),
    ),
    "running statistics": (
        transformers.ResNetModel,
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic"),
    ),
    "layer scales": (
        transformers.Dinov2Model,
        transformers.Dinov2Config(**SMALL, image_size=8, patch_size=4),
    ),
    "index of relative positions": (
        transformers.SwinModel,
        transformers.SwinConfig(
            image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HONEST)
def test_leftover_check_accepts_plain_model(tmp_path: Path, case: str) -> None:
    base = save_base(tmp_path / "base", *HONEST[case])
    indices = {n: v.int() for n, v in tensors(base).items() if v.dtype == torch.int64}  # as codes may be stored
    edit_tensors(base / "model.safetensors", dict(indices))
    assert set(plan(base, [], MergeOptions()).tensors) == set(tensors(base))


def test_leftover_buffers_of_old_versions_are_kept(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    mask = torch.ones(1, 1, 8, 8).tril().to(torch.uint8)
    positions = torch.arange(8, dtype=torch.int32)[None]
    changes: dict[str, torch.Tensor | None] = {"model.layers.0.attn.bias": mask, "model.position_ids": positions}
    edit_tensors(base / "model.safetensors", changes)
    assert changes.keys() <= plan(base, [], MergeOptions()).tensors.keys()


def test_leftover_scales_of_other_modules_are_kept(tmp_path: Path) -> None:
    """Also those of layers that transformers does not build, such as the ones that predict further tokens."""
    base = save_base(tmp_path / "base", *HONEST["logit_scale"])
    changes: dict[str, torch.Tensor | None] = {"mtp.0.hc_attn_scale": torch.ones(3)}
    for name, weight in tensors(base).items():
        if name.endswith("q_proj.weight"):
            changes |= scaled("weight_scale")(name, weight)
            changes[name.replace("weight", "input_scale")] = torch.ones(())
    edit_tensors(base / "model.safetensors", changes)
    edit_json(base / "config.json", quantization_config=FP8)
    planned = plan(base, [], MergeOptions())
    assert {"logit_scale", "mtp.0.hc_attn_scale"} <= planned.tensors.keys()
    assert planned.counts["dequantized"] == len(changes) // 3 == 2
    assert not any("input_scale" in name for name in planned.tensors)
    assert [w for w in planned.warnings if "2 scales of activations (input_scale)" in w]


def test_leftover_gpt_oss_without_settings_is_refused(tmp_path: Path) -> None:
    """Attention alone is trained; the blocks would be copied as bytes that nothing can read any more."""
    config = transformers.GptOssConfig(
        vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=3, num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    base = save_base(tmp_path / "base", transformers.GptOssForCausalLM, config, torch.bfloat16)
    name = "model.layers.0.mlp.experts.down_proj"
    edit_tensors(
        base / "model.safetensors",
        {
            name: None,
            f"{name}_blocks": torch.zeros(3, 64, 3, 16).byte(),
            f"{name}_scales": torch.zeros(3, 64, 3).byte(),
        },
    )
    assert "quantization_config" not in json.loads((base / "config.json").read_text())
    with pytest.raises(CheckpointError, match="MXFP4") as refused:
        plan(base, [], MergeOptions())
    assert refused.value.tensor == f"{name}_blocks"
