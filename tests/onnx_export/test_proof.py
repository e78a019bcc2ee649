"""The proof inside `export`: wrong graphs are refused with figure and module, and the next engine takes over."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from lora_export.contracts import ExportOptions, ExportResult
from lora_export.onnx_export import export
from lora_export.progress import Silent
from lora_export.validation.proof import process
from tests.onnx_export.conftest import VOCABULARY, save_tokenizer

Edit = Callable[[ir.Model], None]


def verdict(result: ExportResult, model: Path, **more: Any) -> dict[str, Any]:
    """What the proof says of an export, held against `model`."""
    request = {
        "model": str(model),
        "export": str(result.output),
        "graphs": list(result.graphs),
        "kind": result.kind,
        "architecture": json.loads((model / "config.json").read_text())["architectures"][0],
        "precision": result.precision,
        "provider": "cpu",
        "elsewhere": "",
        "level": "quick",
        "streamed_numbers": False,
        "far_only": False,
        "adapter": None,
        "result": "proof.json",
    }
    process.main(request | more)
    path = result.output / "proof.json"
    found: dict[str, Any] = json.loads(path.read_text())
    path.unlink()
    return found


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[ExportResult], ExportResult]:
    from dataclasses import replace

    def copy(result: ExportResult) -> ExportResult:
        return replace(result, output=Path(shutil.copytree(result.output, tmp_path / "copy")))

    return copy


def nodes(model: ir.Model, operator: str) -> list[ir.Node]:
    return [n for n in model.graph if n.op_type == operator]


def set_to(operator: str, which: int, **attributes: float) -> Edit:
    """Other attributes of one node."""

    def edit(model: ir.Model) -> None:
        node = nodes(model, operator)[which]
        for name, value in attributes.items():
            node.attributes[name] = (
                ir.AttrFloat32(name, value) if isinstance(value, float) else ir.AttrInt64(name, value)
            )

    return edit


def exchanged(operator: str, which: int, one: int, other: int) -> Edit:
    """Two inputs of a node exchanged; or two of its inputs' values, of another node."""

    def edit(model: ir.Model) -> None:
        node = nodes(model, operator)[which]
        first, second = node.inputs[one], node.inputs[other]
        node.replace_input_with(one, second)
        node.replace_input_with(other, first)

    return edit


def fed(operator: str, which: int, at: int, name: str) -> Edit:
    """A node reads another value of the graph."""

    def edit(model: ir.Model) -> None:
        values = {v.name: v for n in model.graph for v in n.outputs} | {v.name: v for v in model.graph.inputs}
        values |= dict(model.graph.initializers)
        nodes(model, operator)[which].replace_input_with(at, values[name])

    return edit


def numbers(name: str, change: Callable[[Any], Any]) -> Edit:
    """Other numbers of an initializer."""

    def edit(model: ir.Model) -> None:
        value = model.graph.initializers[name]
        value.const_value = ir.Tensor(np.ascontiguousarray(change(value.const_value.numpy().copy())), name=name)

    return edit


def _heads(weight: Any) -> Any:
    weight[:, :32] = np.concatenate([weight[:, 16:32], weight[:, :16]], 1)
    return weight


def _late(sines: Any) -> Any:
    return np.where(np.arange(len(sines))[:, None] > 2, -sines, sines)


SECOND = "model.layers.1"
GQA, SKIP = "GroupQueryAttention", "SkipSimplifiedLayerNormalization"
# Wrong graphs of a Llama: what is done to the right one, and the module that must be named.
WRONG: dict[str, tuple[Edit, str]] = {
    "rope": (numbers("cos_cache", lambda x: np.roll(x, 1, 1)), "layers.0.self_attn"),
    "rope from the third token on": (numbers("sin_cache", _late), "layers.0.self_attn"),
    "a window": (set_to(GQA, 1, local_window_size=6), "layers.1.self_attn"),
    "swapped heads": (numbers("model.layers.0.attn.qkv_proj.MatMul.weight", _heads), "layers.0.self_attn"),
    "missing scale": (set_to(GQA, 0, scale=1.0), "layers.0.self_attn"),
    "dropped state": (fed(GQA, 1, 4, "past_key_values.0.value"), "layers.1.self_attn"),
    "dropped residual": (exchanged(SKIP, 1, 0, 1), ""),
    "residual of another layer": (fed(SKIP, 2, 0, "/model/embed_tokens/Gather/output_0"), "layers.1"),
    "gate and up": (exchanged("Mul", 1, 0, 1), ""),
    "gate twice": (fed("Mul", 1, 1, "/model/layers.0/mlp/gate_proj/MatMul/output_0"), "layers.0.mlp"),
    "epsilon": (set_to(SKIP, 0, epsilon=0.01), "layers.0.post_attention_layernorm"),
    "norm without weight": (numbers(f"{SECOND}.input_layernorm.weight", np.ones_like), "layers.1.input_layernorm"),
    "soft cap": (set_to(GQA, 0, softcap=4.0), "layers.0.self_attn"),
    "not a number": (numbers("lm_head.MatMul.weight", lambda x: np.where(np.arange(100) == 7, np.nan, x)), ""),
}  # fmt: skip
RIGHT = ("dropped residual", "gate and up")  # sums and products in another order: the same numbers


@pytest.mark.parametrize("name", WRONG)
def test_proof_of_wrong_graph_is_refused_with_figure_and_module(
    name: str,
    exported: Callable[..., ExportResult],
    llama: Path,
    copied: Callable[[ExportResult], ExportResult],
) -> None:
    wrong = copied(exported(llama))
    model = ir.load(wrong.model)
    edit, module = WRONG[name]
    edit(model)
    ir.save(model, wrong.model)
    found = verdict(wrong, llama)
    assert found["passed"] == (name in RIGHT)
    if name not in RIGHT:
        assert not float(found["difference"]) <= 1e-4
        assert module in found["module"], found
        assert found["output"] == "logits" and "batch" in found["case"]


def test_proof_of_right_graph_passes(exported: Callable[..., ExportResult], llama: Path) -> None:
    found = verdict(exported(llama), llama)
    assert found["passed"] and float(found["difference"]) <= 1e-5
    assert found["cases"] == 8
    assert "padded on the left" in found["limits"][0]


# --- configurations that the graph was not made for ------------------------------------------------------------

ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LIES: dict[str, dict[str, Any]] = {
    "another base of the angles": {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", **ROPE}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", **ROPE}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", **ROPE}, "max_position_embeddings": 24},
    "longrope beyond its border": {
        "rope_parameters": {
            "rope_type": "longrope", **ROPE, "factor": 1.0, "short_factor": [1.0] * 8, "long_factor": [3.0] * 8,
        },
    },
    "a window": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 20},
    "gelu": {"hidden_act": "gelu"},
    "epsilon": {"rms_norm_eps": 0.001},
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_proof_of_graph_for_another_configuration_is_refused(
    name: str,
    exported: Callable[..., ExportResult],
    llama: Path,
    copied: Callable[[ExportResult], ExportResult],
    model_with: Callable[[dict[str, Any]], Path],
) -> None:
    found = verdict(copied(exported(llama)), model_with(LIES[name]))
    assert not found["passed"] and float(found["difference"]) > 1e-3, found


# --- far lengths, behind a made-up cache -----------------------------------------------------------------------

WINDOW = 600  # far beyond what a quick proof runs at once


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportResult]:
    """A Mistral with a window, and the export of the same weights without one."""
    from transformers import MistralConfig, MistralForCausalLM

    folder = tmp_path_factory.mktemp("mistral")
    torch.manual_seed(5)
    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, sliding_window=None, initializer_range=0.3,
        bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    model = MistralForCausalLM(config)
    model.save_pretrained(folder / "plain")
    save_tokenizer(folder / "plain")
    config.sliding_window = WINDOW
    model.save_pretrained(folder / "window")
    options = ExportOptions("fp32", "cpu", "genai")
    return folder / "window", export(folder / "plain", folder / "onnx", options, progress=Silent())


@pytest.mark.parametrize(("size", "right"), [(-1, False), (WINDOW - 1, False), (WINDOW, True), (WINDOW + 1, False)])
def test_proof_of_far_window_tells_one_key(
    size: int,
    right: bool,
    mistral: tuple[Path, ExportResult],
    copied: Callable[[ExportResult], ExportResult],
) -> None:
    folder, result = mistral
    changed = copied(result)
    model = ir.load(changed.model)
    for layer in range(2):
        set_to(GQA, layer, local_window_size=size)(model)
    ir.save(model, changed.model)
    found = verdict(changed, folder)
    assert found["passed"] == right, found
    if not right:
        assert float(found["difference"]) > 1e-3 and "sliding window of 600" in found["case"]
        assert "layers.0.self_attn" in found["module"]
