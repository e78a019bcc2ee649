"""Mixtures of experts in 4 and 8 bits, by the generic engine: experts are quantized, routers are not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_export.choices import Precision
from lora_export.contracts import ExportOptions, ExportResult, QuantizationOptions
from lora_export.onnx_export import export, reweight
from lora_export.onnx_export.graphs.checks import load_graph
from lora_export.onnx_export.weights import map as weights_map
from lora_export.progress import Silent
from lora_export.validation.graphs import weights as graph_weights
from lora_export.validation.graphs.numbers import judged, numbers_of
from tests.daily import daily
from tests.export_matrix.models import Row
from tests.onnx_export.test_agreement import IDS, through_cache
from tests.onnx_export.test_reweight import same_files

SIZES = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 96}
CASES: list[tuple[str, Precision]] = [
    ("MixtralForCausalLM", "int4"),
    ("MixtralForCausalLM", "int8"),
    ("Qwen3MoeForCausalLM", "int4"),
    ("GptOssForCausalLM", "int4"),  # all experts of a layer in one tensor, (experts, in, out)
    ("GptOssForCausalLM", "nf4"),
]


@pytest.mark.parametrize(("name", "precision"), daily(CASES, []))
def test_quantized_experts_are_right_and_routers_are_not_quantized(
    name: str, precision: Precision, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    Row(name, SIZES).save(model)
    how = QuantizationOptions(accuracy_level=None if precision == "nf4" else 1)
    options = ExportOptions(precision, "cpu", "dynamo", quantization=how)
    made = export(model, tmp_path / "onnx", options, progress=Silent())
    described = weights_map.read(made.output).weights
    experts = [w for w in described if "expert" in w.name and w.recipe.pieces]
    assert experts and all(w.recipe.quantized for w in experts if len(w.shape) > 1 and "bias" not in w.name)
    routers = [w for w in described if ".router." in w.name or ".gate." in w.name]
    assert routers and not any(w.recipe.quantized for w in routers)
    held = _with_numbers_of(made, model, tmp_path / "held")
    with torch.no_grad():
        want = held(torch.tensor(IDS)).logits.numpy()
    got = through_cache(made.model)
    assert np.abs(got - want).max() <= 5e-5 * np.abs(want).max()

    other = tmp_path / "other"
    torch.manual_seed(3)
    changed = {n: t + 0.1 * torch.randn_like(t) for n, t in load_file(model / "model.safetensors").items()}
    other.mkdir()
    for file in model.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
    wanted = export(other, tmp_path / "wanted", options, progress=Silent())
    found = reweight(made.output, other, tmp_path / "found", progress=Silent())
    same_files(wanted.output, found.output)


def _with_numbers_of(made: ExportResult, model: Path, folder: Path) -> Any:
    """The model in PyTorch with the numbers that the graph holds, each judged as the validation judges it."""
    tensors = load_file(model / "model.safetensors")
    shapes = {n: tuple(t.shape) for n, t in tensors.items()}
    exact = numbers_of(model)
    for piece in graph_weights.read([made.model], shapes):
        rows = tensors[piece.tensor][piece.start : piece.stop]
        wanted = exact(piece)
        assert wanted is not None and judged(piece, wanted, None, None)[0] <= 1, piece.tensor
        rows.copy_(piece.values.reshape(rows.shape))
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_graph(made.model).graph.node
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
