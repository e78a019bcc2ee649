"""Configurations of packages in transformers 5 and 4.57: the same logits from both spellings."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from lora_export.packages.companions import for_both
from tests.consumers import environments as consumers
from tests.packages.conftest import save_decoder

pytestmark = pytest.mark.slow
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 900.0, "factor": 4.0}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 700.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        }
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 700.0, "factor": 4.0, "original_max_position_embeddings": 64,
        }
    },
}  # fmt: skip
_SHAPE = {
    "vocab_size": 106, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
}  # fmt: skip
_LOGITS = """
import json, sys, torch, transformers
model = transformers.{auto}.from_pretrained({folder!r}, dtype=torch.float32).eval()
with torch.no_grad():
    logits = model(input_ids=torch.tensor([{ids}])).logits
print(json.dumps([transformers.__version__, logits[0, -1].tolist()]))
"""
IDS = [(7 * i) % 90 + 10 for i in range(40)]


def logits_of(interpreter: Path | None, folder: Path, auto: str = "AutoModelForCausalLM") -> tuple[str, Any]:
    code = _LOGITS.format(auto=auto, folder=str(folder), ids=IDS)
    version, values = consumers.python(interpreter or Path(sys.executable), code)
    return version, np.array(values)


def _others(folder: Path, kind: str) -> tuple[Path, str]:
    """Models whose layers have two rotary embeddings, or one for a part of each head."""
    torch.manual_seed(9)
    if kind == "gemma3":
        rope = {
            "full_attention": {"rope_type": "linear", "rope_theta": 900.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        }
        layers = ["sliding_attention", "full_attention"]
        config = transformers.Gemma3TextConfig(
            **_SHAPE, head_dim=16, rope_parameters=rope, layer_types=layers, sliding_window=8
        )
        model, auto = transformers.Gemma3ForCausalLM(config), "AutoModelForCausalLM"
    elif kind == "phi3":  # the prompt is longer than the original length
        factors = {"short_factor": [1.0 + i / 8 for i in range(6)], "long_factor": [2.0 + i for i in range(6)]}
        rope = {"rope_type": "longrope", "rope_theta": 300.0, "partial_rotary_factor": 0.75, **factors,
                "original_max_position_embeddings": 32}  # fmt: skip
        config = transformers.Phi3Config(
            **_SHAPE, rope_parameters=rope, original_max_position_embeddings=32, pad_token_id=3
        )
        model, auto = transformers.Phi3ForCausalLM(config), "AutoModelForCausalLM"
    elif kind == "qwen3":
        rope = {"rope_type": "yarn", "rope_theta": 700.0, "factor": 4.0, "original_max_position_embeddings": 64}
        config = transformers.Qwen3Config(
            **_SHAPE,
            head_dim=16,
            rope_parameters=rope,
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=1,
        )
        model, auto = transformers.Qwen3ForCausalLM(config), "AutoModelForCausalLM"
    elif kind == "phi":
        rope = {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.25}
        config = transformers.PhiConfig(**_SHAPE, rope_parameters=rope)
        model, auto = transformers.PhiForCausalLM(config), "AutoModelForCausalLM"
    else:
        rope = {
            "full_attention": {"rope_type": "default", "rope_theta": 900.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        }
        settings = {k: v for k, v in _SHAPE.items() if k != "num_key_value_heads"}
        config = transformers.ModernBertConfig(**settings, rope_parameters=rope, local_attention=8,
                                               global_attn_every_n_layers=2, pad_token_id=3)  # fmt: skip
        model, auto = transformers.ModernBertForMaskedLM(config), "AutoModelForMaskedLM"
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder, auto


@pytest.mark.parametrize("kind", [*ROPES, "gemma3", "phi", "phi3", "qwen3", "modernbert"])
def test_both_transformers_versions_read_configuration(kind: str, tmp_path: Path) -> None:
    auto = "AutoModelForCausalLM"
    if kind in ROPES:
        folder = save_decoder(tmp_path / "model", **ROPES[kind])
    else:
        folder, auto = _others(tmp_path / "model", kind)
    both = Path(shutil.copytree(folder, tmp_path / "both"))
    config = json.loads((folder / "config.json").read_text())
    (both / "config.json").write_text(json.dumps(for_both(config)))
    version, wanted = logits_of(None, folder, auto)
    assert version.startswith("5.")
    scale = np.abs(wanted).max()
    assert np.abs(logits_of(None, both, auto)[1] - wanted).max() / scale < 1e-6
    version, old = logits_of(consumers.optimum_python(), both, auto)
    assert version.startswith("4.57") and np.abs(old - wanted).max() / scale < 1e-4
    # The trap that this is about: without the legacy spelling, 4.57 computes something else and says nothing.
    assert np.abs(logits_of(consumers.optimum_python(), folder, auto)[1] - wanted).max() / scale > 1e-2
