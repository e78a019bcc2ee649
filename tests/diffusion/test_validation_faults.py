"""Deliberate faults in merges of images: each is caught by the validation, and named."""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.diffusion.conftest import Bases
from tests.diffusion.files import Family, Plan, make
from tests.diffusion.test_validation import HALF, Tensors, change, failed, merged_with, validated

Fault = Callable[[Tensors], None]


@dataclass(frozen=True)
class Wrong:
    """A fault: what a merge is given in place of the file that is validated. component: that must be blamed."""

    family: Family
    plan: Plan
    fault: Fault
    component: str = "unet"


def _each(ending: str, what: Callable[[torch.Tensor], torch.Tensor], where: str = "") -> Fault:
    def fault(tensors: Tensors) -> None:
        names = [n for n in tensors if n.endswith(ending) and re.search(where, n)]
        assert names, "nothing to do wrong"
        for name in names:
            tensors[name] = what(tensors[name]).contiguous()

    return fault


def _without(pattern: str) -> Fault:
    def fault(tensors: Tensors) -> None:
        names = [n for n in tensors if re.search(pattern, n)]
        assert names, "nothing to leave out"
        for name in names:
            del tensors[name]

    return fault


def _thirds(value: torch.Tensor) -> torch.Tensor:
    q, k, v = value.chunk(3)
    return torch.cat([k, q, v])


def _halves(value: torch.Tensor) -> torch.Tensor:
    return torch.cat(value.chunk(2)[::-1])


def _only_middle(core: torch.Tensor) -> torch.Tensor:
    """As if there were none: up and down meet in the middle of the kernel."""
    ignored = torch.zeros_like(core)
    ignored[..., core.shape[-2] // 2, core.shape[-1] // 2] = torch.eye(len(core))
    return ignored


def _transposed(tensors: Tensors) -> None:
    """The update of a square convolution of one pixel, turned round."""
    for name in [n for n in tensors if n.endswith("proj_in.lora_down.weight")]:
        up = name.replace("lora_down", "lora_up")
        down, tensors[name] = tensors[name], tensors[up].squeeze().T.reshape(tensors[name].shape).contiguous()
        tensors[up] = down.squeeze().T.reshape(tensors[up].shape).contiguous()


LORA = Plan(ranks=(4,), alphas=(2.0,), every=4)
FAULTS = {
    "alpha over rank twice": Wrong("sd15", LORA, _each(".alpha", lambda a: a * a / 4)),
    "alpha ignored": Wrong("sd15", LORA, _each(".alpha", lambda a: torch.full_like(a, 4.0))),
    "second text encoder left out": Wrong("sdxl", LORA, _without("lora_te2_"), "text_encoder_2"),
    "q and k swapped": Wrong(
        "flux", Plan(where="transformer_blocks"), _each("img_attn_qkv.lora_up.weight", _thirds), "transformer"
    ),
    "halves not swapped": Wrong(
        "flux", Plan(where="norm_out"), _each("adaLN_modulation_1.lora_up.weight", _halves), "transformer"
    ),
    "lora_mid ignored": Wrong(
        "sd15", Plan(kinds=("tucker", "lora"), every=3), _each("lora_mid.weight", _only_middle)
    ),
    "one block times 1.02": Wrong("sd15", LORA, _each("lora_up.weight", lambda u: u * 1.02, "down_blocks_0")),
    "transposed convolution of one pixel": Wrong("sd15", Plan(where="proj_in"), _transposed),
    "DoRA as LoRA": Wrong("sd15", Plan(kinds=("dora_rows",), every=4), _without("dora_scale")),
    "DoRA over another axis": Wrong(
        "sd15", Plan(kinds=("dora_rows",), where="to_q"),
        _each("dora_scale", lambda m: m.reshape(1, -1), "attn1"),
    ),
    "IA3 without the one": Wrong("sd15", Plan(kinds=("ia3_rows",), every=4), _each(".weight", lambda w: w - 1)),
    "OFT turned back": Wrong("sd15", Plan(kinds=("oft",), every=4), _each("oft_blocks", lambda b: b.mT)),
    "GLoRA without its first half": Wrong(
        "sd15", Plan(kinds=("glora",), every=4), _each("a1.weight", torch.zeros_like)
    ),
    "bias left out": Wrong("sd3", Plan(kinds=("lora_and_bias",), every=3), _without("diff_b"), "transformer"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_fault_of_a_merge_is_caught(name: str, bases: Bases, tmp_path: Path) -> None:
    wrong = FAULTS[name]
    base = bases(wrong.family, HALF)
    made = make(tmp_path / "style.safetensors", base, wrong.family, "kohya", wrong.plan).path
    given = change(Path(shutil.copy(made, tmp_path / "wrong.safetensors")), wrong.fault)
    merged = merged_with(base, given, tmp_path / "merged")
    result = validated(base, made, merged)
    assert f"{wrong.component}_tensor_errors" in failed(
        result
    ) or f"{wrong.component}_stored_tensors_differ" in failed(result)
    assert any(error.startswith(f"{wrong.component}: ") for error in result.weight_errors)


@pytest.mark.slow
def test_another_weight_than_merged_is_caught(bases: Bases, tmp_path: Path) -> None:
    base = bases("sd3", HALF)
    made = make(tmp_path / "style.safetensors", base, "sd3", "kohya", Plan(every=3)).path
    merged = merged_with(base, made, tmp_path / "merged", weight=0.8)
    assert not failed(validated(base, made, merged, weight=0.8))
    assert {"transformer_tensor_errors", "text_encoder_3_tensor_errors"} <= failed(validated(base, made, merged))


@pytest.mark.slow
def test_base_in_place_of_merged_is_caught(bases: Bases, tmp_path: Path) -> None:
    base = bases("sdxl", HALF)
    made = make(tmp_path / "style.safetensors", base, "sdxl", "kohya", Plan(every=3)).path
    names = failed(validated(base, made, base))
    assert {"unet_t500_max_abs", "text_encoder_max_abs", "text_encoder_2_max_abs", "image_psnr"} <= names
