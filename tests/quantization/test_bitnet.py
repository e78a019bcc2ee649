"""BitNet's ternary weights, packed and quantized anew by each forward, against transformers' own layers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.integrations.bitnet import ActQuant, AutoBitLinear, BitLinear, pack_weights

from lora_export.checkpoint import Checkpoint, open_checkpoint
from lora_export.errors import CheckpointError
from lora_export.quantization import QuantizedWeight, find_quantized
from tests.builders import edit_json, edit_tensors, save_base, tensors


@pytest.fixture(autouse=True)
def _plain_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs as they are, and no compiler: what is compared is the weight."""
    monkeypatch.setattr(ActQuant, "apply", staticmethod(lambda value: value))


def bitnet_base(folder: Path, **settings: Any) -> tuple[Checkpoint, dict[str, QuantizedWeight]]:
    base = save_base(folder)
    changes: dict[str, torch.Tensor | None] = {}
    if settings.get("quantization_mode") != "online":
        for name, weight in tensors(base).items():
            if name.endswith("_proj.weight"):
                scale = weight.abs().mean()
                changes[name] = pack_weights((weight / scale).round().clamp(-1, 1))
                changes[f"{name}_scale"] = scale.reshape(1)
    edit_tensors(base / "model.safetensors", changes)
    edit_json(base / "config.json", quantization_config={"quant_method": "bitnet", **settings})
    checkpoint = open_checkpoint(base)
    return checkpoint, find_quantized(checkpoint, checkpoint.config)


def read(weight: QuantizedWeight, checkpoint: Checkpoint) -> torch.Tensor:
    rows = weight.load(checkpoint)
    whole = rows.rows(0, weight.shape[0])
    for start, stop in ((0, 1), (weight.shape[0] // 4 - 1, weight.shape[0] // 4 + 1), (5, 23)):
        assert torch.equal(rows.rows(start, stop), whole[start:stop])
    return whole


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    """By the description: value k of a byte belongs to the k-th quarter of the rows."""
    return torch.cat([((packed >> 2 * k) & 3).double() for k in range(4)]) - 1


@pytest.mark.parametrize("kind", ["bitlinear", "autobitlinear"])
def test_bitnet_packed_weights_match_formula(tmp_path: Path, kind: str) -> None:
    checkpoint, found = bitnet_base(tmp_path, linear_class=kind, quantization_mode="offline")
    assert len(found) == 14
    for name, weight in found.items():
        packed, scale = checkpoint.read(name), checkpoint.read(f"{name}_scale").double()
        exact = unpacked(packed) / scale if kind == "bitlinear" else unpacked(packed) * scale
        torch.testing.assert_close(read(weight, checkpoint).double(), exact, rtol=2.0**-22, atol=0)
        assert weight.parts == (name, f"{name}_scale")


def test_bitnet_weights_match_transformers_layers(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(2))
    checkpoint, found = bitnet_base(tmp_path / "a", linear_class="autobitlinear", quantization_mode="offline")
    layer = AutoBitLinear(48, 80, bias=False)
    layer.weight.data = unpacked(checkpoint.read(name)).float()
    layer.weight_scale = checkpoint.read(f"{name}_scale")
    torch.testing.assert_close(x @ read(found[name], checkpoint).T, layer(x))
    checkpoint, found = bitnet_base(tmp_path / "b", linear_class="bitlinear")
    old = BitLinear(48, 80, bias=False, dtype=torch.float32)
    ternary = unpacked(checkpoint.read(name)).float()
    expected = old.post_quant_process.__wrapped__(old, x @ ternary.T, checkpoint.read(f"{name}_scale"), 1.0)
    torch.testing.assert_close(x @ read(found[name], checkpoint).T, expected)


def test_bitnet_online_weights_match_forward(tmp_path: Path) -> None:
    checkpoint, found = bitnet_base(tmp_path, linear_class="autobitlinear", quantization_mode="online")
    assert len(found) == 14 and "lm_head.weight" not in found
    for name, weight in found.items():
        stored = checkpoint.read(name).double()
        mean = stored.abs().mean()
        exact = (stored / mean).round().clamp(-1, 1) * mean
        value = read(weight, checkpoint)
        torch.testing.assert_close(value.double(), exact, rtol=2.0**-20, atol=0)
        assert weight.parts == (name,) and len(value.unique()) == 3


def test_bitnet_unquantized_layers_are_kept(tmp_path: Path) -> None:
    settings = {"linear_class": "autobitlinear", "quantization_mode": "online"}
    _, found = bitnet_base(tmp_path, **settings, modules_to_not_convert=["lm_head", "down_proj"])
    assert len(found) == 12 and not any("down_proj" in name for name in found)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"use_rms_norm": True}, "use_rms_norm True"),
        ({"linear_class": "other"}, "linear_class 'other'"),
        ({"quantization_mode": "later"}, "quantization_mode 'later'"),
    ],
)
def test_bitnet_unsupported_settings_are_refused(tmp_path: Path, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        bitnet_base(tmp_path, **settings)
