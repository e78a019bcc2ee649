"""Decoders whose configuration changes what attention sees: rotary scaling, windows, heads, norms, multipliers.

Each is exported tiny, with random weights, and compared with PyTorch beyond its window and beyond the original
length of its rotary embedding. `python -m tests.export_matrix.configurations NAME …` prints a line for each.
"""

import json
import sys
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_export.contracts import ExportOptions, ExportResult
from lora_export.onnx_export import export
from lora_export.progress import Silent
from tests.onnx_export import architectures, runs
from tests.onnx_export.architectures import Architecture
from tests.onnx_export.conftest import VOCABULARY

LONGEST = 100
_PLAIN: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 112, "max_position_embeddings": 128, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


_LINEAR = _rope("linear", factor=4.0)
_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=32)
_BETAS = _rope("yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=8.0, beta_slow=2.0)
_LLAMA3 = _rope(
    "llama3", factor=4.0, original_max_position_embeddings=32, low_freq_factor=1.0, high_freq_factor=4.0
)
_FACTORS = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [1.5 + 0.7 * i for i in range(8)]}
_DYNAMIC = {**_rope("dynamic", factor=4.0), "max_position_embeddings": 64}
_NO_WINDOW = {"sliding_window": None}
_GEMMA = {"head_dim": 16}
_WINDOWED = {"sliding_window": 24}


def _longrope(**more: Any) -> dict[str, Any]:
    """Phi-3's; the key that transformers wrote for the kind of scaling was `type` before it was `rope_type`."""
    rope = {"rope_theta": 10000.0, **_FACTORS, **more}
    return {"rope_parameters": rope, "original_max_position_embeddings": 32, **_NO_WINDOW}


def _by_layer(full: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "rope_parameters": {
            "full_attention": {"rope_theta": 1000000.0, **full},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "layer_types": ["sliding_attention", "full_attention"],
        **_WINDOWED,
    }


_GEMMA3 = {**_GEMMA, **_by_layer({"rope_type": "default"})}
_GEMMA3_4B = {**_GEMMA, **_by_layer({"rope_type": "linear", "factor": 8.0})}
_LAYER_WINDOWS = {
    "use_sliding_window": True, "max_window_layers": 1, "layer_types": ["full_attention", "sliding_attention"],
    **_WINDOWED,
}  # fmt: skip
_SMOL = {"num_hidden_layers": 4, **_rope("default")}
_PHI3 = {"original_max_position_embeddings": 128, "pad_token_id": 3}


def _of(prefix: str, *settings: Mapping[str, Any], config: str = "", scale: float = 0.15) -> Architecture:
    merged = {k: v for s in (_PLAIN, *settings) for k, v in s.items()}
    return Architecture(f"{prefix}ForCausalLM", config or f"{prefix}Config", merged, (), scale=scale)


CONFIGURATIONS: dict[str, Architecture] = {
    "llama-default": _of("Llama"),
    "llama-linear": _of("Llama", _LINEAR),
    "llama-yarn": _of("Llama", _YARN),
    "llama-dynamic": _of("Llama", _DYNAMIC),
    "llama-llama3": _of("Llama", _LLAMA3),
    "llama-bias": _of("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-gelu": _of("Llama", {"hidden_act": "gelu"}),
    "llama-relu": _of("Llama", {"hidden_act": "relu"}),
    "llama-tied": _of("Llama", {"tie_word_embeddings": True}),
    "llama-headdim": _of("Llama", {"head_dim": 24}),
    "mistral-window": _of("Mistral", _WINDOWED),
    "mistral-yarn": _of("Mistral", _YARN, _NO_WINDOW),
    "mistral-linear": _of("Mistral", _LINEAR, _NO_WINDOW),
    "qwen2-yarn": _of("Qwen2", _YARN),
    "qwen2-window": _of("Qwen2", _LAYER_WINDOWS),
    "qwen2-dynamic": _of("Qwen2", _DYNAMIC),
    "qwen3-yarn": _of("Qwen3", _YARN, {"head_dim": 16}),
    "qwen3-bias": _of("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen3-window": _of("Qwen3", {"head_dim": 16}, _LAYER_WINDOWS),
    "phi3-window": _of("Phi3", _PHI3, _WINDOWED),
    "phi3-longrope": _of("Phi3", _longrope(rope_type="longrope")),
    "phi3-longrope-type": _of("Phi3", _longrope(rope_type="longrope", type="longrope")),
    "phi3-partial": _of("Phi3", _PHI3, _NO_WINDOW, {"head_dim": 32, **_rope("default", partial_rotary_factor=0.5)}),
    "phi-gqa": _of("Phi", {"hidden_size": 128, **_rope("default", partial_rotary_factor=0.5)}, scale=0.08),
    "gemma3-4b-rope": _of("Gemma3", _GEMMA3_4B, config="Gemma3TextConfig"),
    "gemma3-default-rope": _of("Gemma3", _GEMMA3, config="Gemma3TextConfig"),
    "gemma3-h640": _of("Gemma3", _GEMMA3, {"hidden_size": 640}, config="Gemma3TextConfig", scale=0.05),
    "gemma3-h72": _of("Gemma3", _GEMMA3, {"hidden_size": 72}, config="Gemma3TextConfig"),
    "gemma3-qpas": _of("Gemma3", _GEMMA3, {"query_pre_attn_scalar": 48}, config="Gemma3TextConfig"),
    "gemma3-tied-false": _of("Gemma3", _GEMMA3, {"tie_word_embeddings": False}, config="Gemma3TextConfig"),
    "gemma2-h72": _of("Gemma2", _GEMMA, {"hidden_size": 72}, _WINDOWED),
    "gemma-h72": _of("Gemma", _GEMMA, {"hidden_size": 72}),
    "gemma-gelu": _of("Gemma", _GEMMA, {"hidden_activation": "gelu", "hidden_act": "gelu"}),
    "granite": _of("Granite", {
        "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "logits_scaling": 4.0, "residual_multiplier": 0.3,
    }),
    "granite-bias": _of("Granite", {"attention_bias": True, "mlp_bias": True}),
    "granite-yarn": _of("Granite", _YARN),
    "olmo-clip": _of("Olmo", {"clip_qkv": 0.7}),
    "smollm3-nope": _of("SmolLM3", _SMOL),
    "smollm3-window": _of("SmolLM3", _SMOL, {
        "use_sliding_window": True, "no_rope_layers": [1, 1, 1, 1],
        "layer_types": ["sliding_attention", "full_attention"] * 2, **_WINDOWED,
    }),
    "nemotron-partial": _of("Nemotron", {"hidden_size": 128, "partial_rotary_factor": 0.5}, scale=0.08),
    "ernie-bias": _of("Ernie4_5", {"use_bias": True}),
    "hunyuan-alpha": _of("HunYuanDenseV1", {"head_dim": 16, **_rope("dynamic", alpha=50.0, factor=1.0)}),
    "qwen3-yarn-beta": _of("Qwen3", _BETAS, {"head_dim": 16}),
    "mistral-yarn-beta": _of("Mistral", _BETAS, _NO_WINDOW),
    "qwen3-yarn-nobeta": _of("Qwen3", _YARN, {"head_dim": 16, "tie_word_embeddings": True}),
    "phi4mini-2": _of("Phi3", _PHI3, _NO_WINDOW, _rope("default", partial_rotary_factor=0.75)),
    "llama-headdim120": _of("Llama", {"head_dim": 120}),
    "mistral-nowindow": _of("Mistral", _NO_WINDOW),
    "gemma3-4b-heads": _of("Gemma3", _GEMMA3_4B, {
        "hidden_size": 80, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
        "query_pre_attn_scalar": 32,
    }, config="Gemma3TextConfig"),
    "phi4mini-3": _of("Phi3", {
        "hidden_size": 128, "original_max_position_embeddings": 32, "rope_parameters": {
            "rope_theta": 10000.0, "rope_type": "longrope", "type": "longrope", "partial_rotary_factor": 0.5,
            **_FACTORS,
        }, "tie_word_embeddings": True, "head_dim": 32, **_NO_WINDOW,
    }, scale=0.08),
    "smollm3-allrope": _of("SmolLM3", _SMOL, {"no_rope_layers": [1, 1, 1, 1]}),
}  # fmt: skip


@dataclass(frozen=True)
class Figures:
    """The engine, and the largest differences of the logits, relative to the largest: a prompt of 20 tokens; 20 and
    four steps; 100 tokens at once; 20 and steps to 100; 60, then 40 more at once."""

    engine: str
    differences: tuple[float, ...]

    @property
    def worst(self) -> float:
        return max(self.differences)


def measured(architecture: Architecture, folder: Path, engine: str | None = None) -> Figures:
    """Export a configuration into `folder`, and compare it with PyTorch. Raises what `export` raises."""
    model = folder / "model"
    architectures.save(architecture, model)
    options = ExportOptions("fp32", "cpu", engine=engine)
    result = export(model, folder / "onnx", options, progress=Silent())
    return Figures(result.engine, differences(result, architectures.build(architecture)))


def differences(result: ExportResult, model: Any) -> tuple[float, ...]:
    session = runs.session(result.model)
    ids = torch.randint(4, VOCABULARY, (1, LONGEST), generator=torch.Generator().manual_seed(5))
    steps = (
        (20,),
        (20, 21, 22, 23, 24),
        (LONGEST,),
        (20, *range(21, LONGEST + 1)),
        (60, LONGEST),
    )
    wanted = _fed if _follows_length(model) else _whole
    return tuple(_apart(session, ids.numpy(), ends, wanted(model, ids, ends)) for ends in steps)


def _follows_length(model: Any) -> bool:
    """Whether keys are rotated by how long the text is when they come: what comes of a step then depends on those
    before it, in transformers too."""
    return getattr(model.model.rotary_emb, "rope_type", None) in ("dynamic", "longrope")


@torch.no_grad()
def _whole(model: Any, ids: torch.Tensor, ends: tuple[int, ...]) -> Any:
    """Logits of the whole text, without a cache."""
    return model(ids[:, : ends[-1]]).logits[0].float().numpy()


@torch.no_grad()
def _fed(model: Any, ids: torch.Tensor, ends: tuple[int, ...]) -> Any:
    """Logits of steps with transformers' cache."""
    model(ids[:, :2])  # a rotary embedding remembers the longest text
    past, at, found = None, 0, []
    for end in ends:
        out = model(ids[:, at:end], past_key_values=past, use_cache=True)
        found.append(out.logits[0].float().numpy())
        past, at = out.past_key_values, end
    return np.concatenate(found)


def _apart(session: Any, ids: Any, ends: tuple[int, ...], wanted: Any) -> float:
    """Feeds tokens up to each of `ends` in turn, with the cache of those before."""
    past, at, worst = empty_cache(session), 0, 0.0
    for end in ends:
        feeds = {
            "input_ids": ids[:, at:end], "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(at, end)[None], **past,
        }  # fmt: skip
        found = run(session, feeds)
        apart = np.abs(found["logits"][0] - wanted[at:end]).max() / np.abs(wanted).max()
        worst = max(worst, float(apart) if np.isfinite(apart) else np.inf)
        past, at = grown_cache(found), end
    return worst


def run(session: Any, feeds: Mapping[str, Any]) -> dict[str, Any]:
    """Outputs by name; `feeds` may contain more than the graph takes."""
    names = [o.name for o in session.get_outputs()]
    given = {i.name: feeds[i.name] for i in session.get_inputs()}
    return dict(zip(names, session.run(names, given), strict=True))


_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def empty_cache(session: Any, batch: int = 1) -> dict[str, Any]:
    """No keys and values, and states of zeros."""
    return {
        i.name: np.zeros((batch, *(d if isinstance(d, int) else 0 for d in i.shape[1:])), _TYPES[i.type])
        for i in session.get_inputs()
        if i.name.startswith("past")
    }


def grown_cache(found: Mapping[str, Any]) -> dict[str, Any]:
    """What a step leaves, under the names by which the next step takes it."""
    return {
        n.replace("present.", "past." if n.endswith((".conv", ".recurrent")) else "past_key_values."): v
        for n, v in found.items()
        if n.startswith("present")
    }


def main() -> None:
    names = [a for a in sys.argv[1:] if not a.startswith("--")] or [*CONFIGURATIONS]
    engine = next((a.removeprefix("--engine=") for a in sys.argv[1:] if a.startswith("--engine=")), None)
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            try:
                figures = measured(CONFIGURATIONS[name], Path(folder), engine)
                line = f"{figures.engine:8} {' '.join(f'{d:9.1e}' for d in figures.differences)}"
            except Exception as error:
                if len(names) == 1:
                    traceback.print_exc()
                line = json.dumps(" ".join(str(error).split())[:230])
            sys.stdout.write(f"{name:22} {line}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
