"""Adapters of mlx-lm, against its own forward pass in float64 (mlx_lm/tuner/lora.py, dora.py)."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lora_export.contracts import AdapterChoice, ValidationOptions
from lora_export.errors import AdapterError
from lora_export.merging import merge
from lora_export.progress import Silent
from lora_export.validation import validate
from tests.builders import llama_config, load, logits, save_base, tensors

RANK, SCALE = 6, 3.5
WIDTH, EXPERTS, INNER = 48, 4, 40
KEYS = {"q_proj": (48, 48), "v_proj": (48, 24), "down_proj": (80, 48)}  # (in, out)


def save(folder: Path, values: dict[str, torch.Tensor], dora: bool = False, **config: Any) -> Path:
    """As mx.save_safetensors writes it: metadata null, and names in another order than their bytes."""
    folder.mkdir(parents=True)
    header: dict[str, Any] = {"__metadata__": None}
    data = b""
    for name, value in values.items():
        raw = value.float().contiguous().numpy().tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(value.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(dict(sorted(header.items()))).encode()
    text += b" " * (-len(text) % 8)
    (folder / "adapters.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    parameters = {"rank": RANK, "scale": SCALE, "dropout": 0.0}
    settings = {"fine_tune_type": "dora" if dora else "lora", "num_layers": 2, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"model": "owner/base"} | config))
    return folder


def pair(module: str, *shapes: tuple[int, ...], seed: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed + len(module))
    leaves = zip(("lora_a", "lora_b", "m"), shapes, strict=False)
    drawn = {f"{module}.{leaf}": torch.randn(shape, generator=generator) * 0.3 for leaf, shape in leaves}
    return {name: value.abs() + 0.5 if name.endswith(".m") else value for name, value in drawn.items()}


def on_linears(dora: bool = False) -> dict[str, torch.Tensor]:
    values: dict[str, torch.Tensor] = {}
    for layer in range(2):
        for key, (width, out) in KEYS.items():
            owner = "mlp" if key == "down_proj" else "self_attn"
            shapes = [(width, RANK), (RANK, out), (out,)][: 3 if dora else 2]
            values |= pair(f"model.layers.{layer}.{owner}.{key}", *shapes, seed=layer)
    return values


def on_embedding(dora: bool = False) -> dict[str, torch.Tensor]:
    return pair("model.embed_tokens", *[(101, RANK), (RANK, WIDTH), (101,)][: 3 if dora else 2])


def forward(base: Path, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of mlx-lm's forward; a tied head is the embedding's `as_linear`."""
    model = load(base).double()
    exact = {name: value.double() for name, value in values.items()}
    for module in {name.rpartition(".")[0] for name in exact}:
        layer = model.get_submodule(module)
        a, b, m = (exact.get(f"{module}.{leaf}") for leaf in ("lora_a", "lora_b", "m"))
        assert a is not None and b is not None
        if isinstance(layer, torch.nn.Embedding):
            _embed(model, layer, a, b, m)
        else:
            layer.register_forward_hook(_linear(layer.weight, a, b, m))
    return logits(model)


def _linear(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, m: torch.Tensor | None) -> Any:
    def hook(_: Any, inputs: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
        out = y + SCALE * (inputs[0] @ a) @ b
        if m is None:
            return out
        return m / torch.linalg.norm(weight + (SCALE * b.T) @ a.T, dim=1) * out

    return hook


def _embed(model: Any, layer: Any, a: torch.Tensor, b: torch.Tensor, m: torch.Tensor | None) -> None:
    def embed(_: Any, inputs: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
        out = y + SCALE * a[inputs[0]] @ b
        return out if m is None else (m[inputs[0]] / torch.linalg.norm(out, dim=-1))[..., None] * out

    layer.register_forward_hook(embed)
    if model.config.tie_word_embeddings:
        model.lm_head.register_forward_hook(_linear(layer.weight, b.T, a.T, m))


CASES = {
    "linears": (on_linears(), False, False),
    "dora": (on_linears(dora=True), True, False),
    "embedding": (on_linears() | on_embedding() | pair("lm_head", (WIDTH, RANK), (RANK, 101)), False, False),
    "dora on the embedding": (on_linears(dora=True) | on_embedding(dora=True), True, False),
    "tied": (on_linears() | on_embedding(), False, True),
    "dora, tied": (on_linears(dora=True) | on_embedding(dora=True), True, True),
}


@pytest.mark.parametrize("case", CASES)
def test_merge_mlx_equals_mlx_forward(tmp_path: Path, case: str) -> None:
    values, dora, tied = CASES[case]
    base = save_base(tmp_path / "base", config=llama_config(tied=tied))
    merge(base, [AdapterChoice(save(tmp_path / "adapter", values, dora))], tmp_path / "out")
    exact = forward(base, values)
    assert (exact - logits(load(base))).abs().max() > 0.1
    torch.testing.assert_close(logits(load(tmp_path / "out")), exact, rtol=1e-5, atol=1e-5)
    assert ("lm_head.weight" in tensors(tmp_path / "out")) is not tied


def moe_base(folder: Path) -> Path:
    config = transformers.Qwen3MoeConfig(
        hidden_size=WIDTH, moe_intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=4, head_dim=12,
        num_key_value_heads=2, vocab_size=101, num_experts=EXPERTS, num_experts_per_tok=2, bos_token_id=1,
        eos_token_id=2, max_position_embeddings=64,
    )  # fmt: skip
    return save_base(folder, transformers.Qwen3MoeForCausalLM, config)


def on_experts(flat: bool = False) -> dict[str, torch.Tensor]:
    values: dict[str, torch.Tensor] = {}
    for layer in range(2):
        for key, width, out in (
            ("gate_proj", WIDTH, INNER),
            ("up_proj", WIDTH, INNER),
            ("down_proj", INNER, WIDTH),
        ):
            module = f"model.layers.{layer}.mlp.switch_mlp.{key}"
            values |= pair(module, (EXPERTS, RANK, width), (EXPERTS, out, RANK), seed=layer)
            values[f"{module}.lora_a"] = values[f"{module}.lora_a"].flatten(0, int(flat))
    return values


@pytest.mark.parametrize("flat", [False, True], ids=["stacked", "with experts and ranks in one dimension"])
def test_mlx_experts_equal_mlx_forward(tmp_path: Path, flat: bool) -> None:
    """LoRASwitchLinear: each token goes through a and b of its experts, so an expert's weight gains scale·b·a."""
    base, values = moe_base(tmp_path / "base"), on_experts(flat)
    merge(base, [AdapterChoice(save(tmp_path / "adapter", values))], tmp_path / "out")
    before, after = tensors(base), tensors(tmp_path / "out")
    for name, value in after.items():
        parts = name.split(".")
        exact = before[name].double()
        if "experts" in parts:
            module = ".".join([*parts[:4], "switch_mlp", parts[6]])
            a = values[f"{module}.lora_a"].reshape(EXPERTS, RANK, -1)[int(parts[5])].double()
            exact = exact + SCALE * values[f"{module}.lora_b"][int(parts[5])].double() @ a
        torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, "experts"])
def test_validate_mlx_passes_and_wrong_scale_fails(tmp_path: Path, case: str) -> None:
    """The reference reads the file by itself: what another scale merges is refused."""
    values, dora, tied = CASES.get(case, (on_experts(), False, False))
    base = moe_base(tmp_path / "base") if case == "experts" else None
    base = base or save_base(tmp_path / "base", config=llama_config(tied=tied))
    adapter = save(tmp_path / "adapter", values, dora)
    other = {"rank": RANK, "scale": SCALE + 0.01, "dropout": 0.0}
    wrong = save(tmp_path / "wrong", values, dora, lora_parameters=other)
    for folder, passes in ((adapter, True), (wrong, False)):
        merge(base, [AdapterChoice(folder)], tmp_path / f"of {folder.name}")
        merged = tmp_path / f"of {folder.name}"
        result = validate(base, [AdapterChoice(adapter)], merged, options=ValidationOptions(), progress=Silent())
        assert result.passed is passes


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"fine_tune_type": "full"}, "full weights"),
        ({"lora_parameters": {"rank": RANK, "dropout": 0.0}}, "scale is None"),
        ({"lora_parameters": {"rank": 0, "scale": 1.0}}, "rank is 0"),
        ({"lora_parameters": {"rank": RANK, "scale": 1.0, "alpha": 16}}, "both scale 1 and alpha 16"),
        ({"lora_parameters": [RANK]}, "lora_parameters is"),
    ],
)
def test_read_mlx_unsupported_adapter_is_refused(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    base = save_base(tmp_path / "base")
    adapter = save(tmp_path / "adapter", on_linears(), **config)
    with pytest.raises(AdapterError, match=words):
        merge(base, [AdapterChoice(adapter)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model.norm.weight": torch.ones(WIDTH)}, "not part of mlx-lm's LoRA"),
        (pair("model.layers.0.self_attn.q_proj", (48, RANK)), "lora_B of this module is missing"),
        (pair("model.layers.0.self_attn.q_proj", (48, RANK + 1), (RANK + 1, 48)), "the tensors have rank 7"),
        (pair("model.layers.0.self_attn.q_proj", (48,), (RANK, 48)), r"the shape is \[48\]"),
        (pair("model.layers.0.mlp.experts.up_proj", (7, 5), (EXPERTS, 5, RANK)), r"the shape is \[7, 5\]"),
        (pair("model.layers.0.self_attn.q_proj", (40, RANK), (RANK, 48)), "fits a weight of shape"),
    ],
)
def test_read_mlx_damaged_tensors_is_refused(tmp_path: Path, values: dict[str, torch.Tensor], words: str) -> None:
    base = save_base(tmp_path / "base")
    with pytest.raises(AdapterError, match=words):
        merge(base, [AdapterChoice(save(tmp_path / "adapter", values))], tmp_path / "out")
