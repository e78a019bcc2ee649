"""Every architecture: exported, re-weighted for a merged LoRA, and compared with the unmerged model."""

from collections import Counter
from pathlib import Path

import onnx
import pytest

from lora_export.contracts import AdapterChoice, ExportOptions, ExportResult
from lora_export.merging import merge
from lora_export.onnx_export import export, reweight
from lora_export.onnx_export.engines import engines
from lora_export.onnx_export.weights import map as weights_map
from lora_export.progress import Silent
from tests.daily import daily
from tests.onnx_export.architectures import DYNAMO, GENAI, Architecture, save, save_adapter
from tests.onnx_export.runs import worst

ALL = DYNAMO | GENAI
# One of each kind, for every day; all others are exported by `make test-all`.
QUICK = {
    "BertForSequenceClassification", "LlamaForCausalLM", "WhisperForConditionalGeneration",
}  # fmt: skip
RELATIVE = 1e-4  # of fp32 results: another order of additions


def operators(result: ExportResult) -> Counter[str]:
    graphs = [onnx.load(result.output / name, load_external_data=False).graph for name in result.graphs]
    return Counter(node.op_type for graph in graphs for node in graph.node)


@pytest.mark.parametrize("name", daily(ALL, QUICK))
def test_export_matrix_merged_graph_agrees(name: str, tmp_path: Path) -> None:
    architecture = ALL[name]
    base = save(architecture, tmp_path / "base")
    unmerged = save_adapter(architecture, base, tmp_path / "adapter")
    exported = export(base, tmp_path / "onnx", ExportOptions("fp32", "cpu"), progress=Silent())
    merge(base, [AdapterChoice(tmp_path / "adapter")], tmp_path / "merged")
    result = reweight(exported.output, tmp_path / "merged", tmp_path / "merged-onnx", progress=Silent())
    assert result.graphs == exported.graphs
    assert worst(result, unmerged) <= RELATIVE
    _check_graph(architecture, exported)


def _check_graph(architecture: Architecture, result: ExportResult) -> None:
    found = operators(result)
    assert not any(node for node in found if node in ("IsNaN", "Loop", "If"))
    if architecture.attention is not None:
        kinds = ("Attention", "MultiHeadAttention", "GroupQueryAttention")
        assert sum(found[kind] for kind in kinds) == architecture.attention
        assert found["Softmax"] == 0
    described = weights_map.read(result.output)
    large = [w for w in described.weights if not w.recipe.pieces and w.nbytes > 64 * 64 * 4]
    assert not large  # no matrix of this size is a constant


def test_export_matrix_has_every_family() -> None:
    assert len(ALL) >= 20
    assert ALL.keys() >= QUICK
    for name, engine in engines().items():
        if name != "diffusion":  # tests/diffusion/test_export.py has its families
            assert any(engine.exports({"architectures": [each]}) for each in ALL)
