"""Mixtures of experts: where transformers' parameters come from, the products of sorted tokens, and their bytes."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_export.checkpoint import TensorFiles, open_checkpoint
from lora_export.contracts import ExportOptions
from lora_export.onnx_export import export, reweight
from lora_export.onnx_export.engines.dynamo_passes import experts
from lora_export.onnx_export.engines.dynamo_passes.passes import settle
from lora_export.onnx_export.engines.dynamo_passes.traced_graph import TracedGraph
from lora_export.onnx_export.engines.model_without_weights import load_without_weights
from lora_export.onnx_export.weights.layout import DataFiles
from lora_export.onnx_export.weights.map import Piece, Quantization, Recipe, Weight, WeightsMap, placed
from lora_export.progress import Silent
from tests.export_matrix.models import Row

EXPERTS, ROWS, COLUMNS = 3, 5, 4
DRAW = torch.Generator().manual_seed(5)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
def test_merged_parameters_of_experts_are_lines_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    Row(name).save(tmp_path)
    loaded = load_without_weights(getattr(transformers, name), tmp_path)
    stored, whole = _tensors(tmp_path), getattr(transformers, name).from_pretrained(tmp_path).state_dict()
    assert {n.rpartition(".")[2] for n in loaded.merged} == {"gate_up_proj", "down_proj"}
    for parameter, recipe in loaded.merged.items():
        lines = torch.cat([stored[p.tensor][p.start : p.stop] for p in recipe.pieces])
        assert torch.equal(lines.reshape(whole[parameter].shape), whole[parameter])


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("counts", [(2, 0, 5), (0, 0, 1), (7, 0, 0)])
def test_expanded_products_multiply_each_share_with_its_expert(turned: bool, counts: tuple[int, ...]) -> None:
    weight = torch.randn((EXPERTS, ROWS, COLUMNS), generator=DRAW)
    matrices = weight.transpose(1, 2) if turned else weight
    states = torch.randn((sum(counts), matrices.shape[1]), generator=DRAW)
    shares = torch.split(states, counts)
    expected = torch.cat([share @ matrix for share, matrix in zip(shares, matrices, strict=True)])
    session = onnxruntime.InferenceSession(_expanded(weight, turned), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"states": states.numpy(), "counts": np.array(counts)})
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)


def _expanded(weight: torch.Tensor, turned: bool) -> bytes:
    states = ir.Value(name="states", shape=ir.Shape(["n", None]), type=ir.TensorType(ir.DataType.FLOAT))
    counts = ir.Value(name="counts", shape=ir.Shape([EXPERTS]), type=ir.TensorType(ir.DataType.INT64))
    all_experts = ir.Value(
        name="experts", const_value=ir.tensor(weight.numpy(), name="experts"), shape=ir.Shape(weight.shape),
        type=ir.TensorType(ir.DataType.FLOAT),
    )  # fmt: skip
    node = ir.node("GroupedMatMul", [states, counts, all_experts], {"turned": int(turned)}, domain="lora_export")
    node.name, node.outputs[0].name = "products", "out"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    inner = ir.Graph(
        [states, counts], node.outputs, nodes=[node], initializers=[all_experts], name="g", opset_imports={"": 20}
    )
    graph = TracedGraph(ir.Model(inner, ir_version=10), {})
    experts.expand(graph)
    settle(graph)
    return ir.to_proto(graph.model).SerializeToString()


@pytest.fixture
def source(tmp_path: Path) -> tuple[torch.Tensor, TensorFiles]:
    weight = torch.randn((EXPERTS, 48, 32), generator=DRAW)
    save_file({"experts": weight}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return weight, TensorFiles(open_checkpoint(tmp_path).tensors)


def _written(tmp_path: Path, weights: Any, source: TensorFiles) -> tuple[Weight, ...]:
    out = tmp_path / "out"
    out.mkdir()
    described = WeightsMap(placed(weights))
    for name in described.sizes:
        with contextlib.suppress(FileExistsError):
            (out / name).touch()
    DataFiles(out, described, source, Silent()).write()
    return described.weights


def test_data_file_of_an_expert_is_its_matrix_turned(tmp_path: Path, source: Any) -> None:
    weight, files = source
    recipe = Recipe((Piece("experts", 1, 2),), transposed=True)
    (placed_weight,) = _written(tmp_path, [Weight("one", "data", "float32", (32, 48), recipe)], files)
    data = np.fromfile(tmp_path / "out" / "data", np.float32, 32 * 48, offset=placed_weight.offset)
    assert np.array_equal(data.reshape(32, 48), weight[1].numpy().T)


def test_quantized_data_of_an_expert_is_that_of_its_matrix_alone(tmp_path: Path, source: Any) -> None:
    weight, files = source
    alone = tmp_path / "alone"
    alone.mkdir()
    save_file({"experts": weight[2].contiguous()}, alone / "model.safetensors")
    (alone / "config.json").write_text("{}")

    def data(folder: Path, piece: Piece, files: TensorFiles) -> bytes:
        packed = Recipe((piece,), True, quantized=Quantization("int4", "packed", 32))
        scales = Recipe((piece,), True, quantized=Quantization("int4", "scales", 32))
        parts = [
            Weight("q", "data", "uint8", (48, 1, 16), packed),
            Weight("s", "data", "float32", (48, 1), scales),
        ]
        _written(folder, parts, files)
        return (folder / "out" / "data").read_bytes()

    of_all = data(tmp_path, Piece("experts", 2, 3), files)
    assert of_all == data(alone, Piece("experts", 0, 48), TensorFiles(open_checkpoint(alone).tensors))
    assert len(set(of_all)) > 16


@pytest.mark.slow
def test_next_weights_of_a_mixture_are_byte_equal_to_a_fresh_export(tmp_path: Path) -> None:
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    Row("MixtralForCausalLM").save(base)
    shutil.copytree(base, tuned)
    changed = _tensors(base)
    for name, tensor in changed.items():
        if "experts.2" in name or "gate" in name:
            tensor.add_(torch.randn(tensor.shape, generator=DRAW) * 0.1)
    save_file(changed, tuned / "model.safetensors", {"format": "pt"})
    options = ExportOptions("fp32", "cpu", engine="dynamo")
    first = export(base, tmp_path / "first", options, progress=Silent())
    fresh = export(tuned, tmp_path / "fresh", options, progress=Silent())
    next_one = reweight(first.output, tuned, tmp_path / "next", progress=Silent())
    written = [(folder.output / "model.onnx_data").read_bytes() for folder in (first, fresh, next_one)]
    assert written[1] == written[2] != written[0]
    assert (fresh.output / "model.onnx").read_bytes() == (next_one.output / "model.onnx").read_bytes()
