"""Mixtures of experts by the builder: what its operators compute, against the formula in numpy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from lora_export.contracts import ExportOptions, ExportResult
from lora_export.onnx_export import export
from lora_export.onnx_export.weights import map as weights_map
from lora_export.progress import Silent
from tests.export_matrix import configurations
from tests.export_matrix.builder import MODELS
from tests.onnx_export import architectures
from tests.onnx_export.conftest import VOCABULARY


@pytest.fixture(
    scope="module",
    params=[
        ("lfm2-moe", "int4"),
        pytest.param(("gpt-oss", "int4"), marks=pytest.mark.slow),
        pytest.param(("lfm2-moe", "int8"), marks=pytest.mark.slow),
    ],
    ids="-".join,
)
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    folder = tmp_path_factory.mktemp("experts")
    model, precision = request.param
    architectures.save(MODELS[model], folder / "model")
    options = ExportOptions(precision, "cpu", engine="genai")
    return export(folder / "model", folder / "onnx", options, progress=Silent())


def test_quantized_experts_compute_what_their_numbers_say(quantized: ExportResult) -> None:
    nodes, values = _seen(quantized.model)
    assert len(nodes) == 2
    for node in nodes:
        x, router, *arrays = [values[v.name] if v is not None and v.name else None for v in node.inputs]
        bits = node.attributes["expert_weight_bits"].as_int()
        gate_up, down = _numbers(arrays[0], arrays[1], bits), _numbers(arrays[3], arrays[4], bits)
        layer = _Layer(gate_up, down, arrays[2], arrays[5], node)
        wanted = layer(x.reshape(-1, x.shape[-1]), router)
        found = values[node.outputs[0].name].reshape(wanted.shape)
        assert np.abs(found - wanted).max() <= 2e-5 * np.abs(wanted).max()


def test_quantized_experts_keep_routers_in_fp32(quantized: ExportResult) -> None:
    routers = [n for n in ir.load(quantized.model).graph if "/router/" in str(n.name) and "MatMul" in n.op_type]
    assert [n.op_type for n in routers] == ["MatMul"] * 2


def test_quantized_experts_are_described_by_the_tensors_of_the_checkpoint(quantized: ExportResult) -> None:
    described = [w for w in weights_map.read(quantized.output).weights if "_proj.weight" in w.name]
    experts = [w for w in described if ".experts." in w.name]
    assert experts and all(w.recipe.quantized and w.recipe.pieces for w in experts)


def _seen(model: Path) -> tuple[list[ir.Node], dict[str, Any]]:
    """The QMoE nodes, and what goes into them and comes out of them for some text."""
    graph = ir.load(model)
    nodes = [n for n in graph.graph if n.op_type == "QMoE"]
    wanted = {v.name: v for n in nodes for v in (*n.inputs, *n.outputs) if v is not None and v.name}
    known = {o.name for o in graph.graph.outputs}
    graph.graph.outputs.extend(v for name, v in wanted.items() if name not in known)
    seen = model.with_name("seen.onnx")
    ir.save(graph, seen)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(seen), options, providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(0).integers(4, VOCABULARY, (2, 30))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), **configurations.empty_cache(session, 2)}
    return nodes, configurations.run(session, feeds)


def _numbers(packed: Any, scales: Any, bits: int) -> Any:
    """(experts, lines, width), from numbers around 8 or 128; the lower half of a byte comes first."""
    if bits == 4:
        packed = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:2], -1)
    numbers = packed.astype(np.float32) - 2 ** (bits - 1)
    return numbers * np.repeat(scales, numbers.shape[-1] // scales.shape[-1], -1)


@dataclass(frozen=True)
class _Layer:
    """gate_up: gate and up in turn, (experts, 2 × inner, size); down: (experts, size, inner); biases by expert."""

    gate_up: Any
    down: Any
    gate_up_bias: Any
    down_bias: Any
    node: ir.Node

    def __call__(self, x: Any, router: Any) -> Any:
        count, alpha, beta = (self.node.attributes[n].value for n in ("k", "activation_alpha", "activation_beta"))
        limit = self.node.attributes["swiglu_limit"].value if "swiglu_limit" in self.node.attributes else np.inf
        out = np.zeros_like(x, shape=(len(x), self.down.shape[1]))
        for row, scores in enumerate(router):
            chosen = np.argsort(-scores)[:count]
            shares = np.exp(scores[chosen] - scores[chosen].max())
            for expert, share in zip(chosen, shares / shares.sum(), strict=True):
                gate, up = (self.gate_up[expert] @ x[row] + self.gate_up_bias[expert]).reshape(-1, 2).T
                gate, up = gate.clip(None, limit), up.clip(-limit, limit)
                inner = gate / (1 + np.exp(-alpha * gate)) * (up + beta)
                out[row] += share * (self.down[expert] @ inner + self.down_bias[expert])
        return out
