"""Embedders: the graph gives the embedding that modules.json describes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers
from safetensors.torch import save_file

from lora_export import sentence_modules
from lora_export.contracts import ExportOptions, ExportResult
from lora_export.errors import LoraExportError
from lora_export.onnx_export import export, reweight
from lora_export.onnx_export.engines.parts import forward_inputs
from lora_export.onnx_export.engines.parts.sentence import Pooling
from lora_export.progress import Silent
from tests.daily import daily
from tests.export_matrix.models import Row
from tests.onnx_export.sentences import pooled, save_modules, worst
from tests.onnx_export.test_proof import verdict

MODES = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
Modules = dict[str, Any]
POOLINGS: dict[str, Modules] = {
    "all, dense": {"modes": MODES, "dense": ((40, "Tanh"), (24, "Identity")), "normalize": False},
    "dense, normalized": {"dense": ((40, "GELU"),)},
}
DECODERS = {
    "Qwen3ForCausalLM": {"modes": ("lasttoken",)},
    "MistralForCausalLM": {"modes": ("lasttoken",)},
    "LlamaForCausalLM": {"modes": ("weightedmean_tokens",), "normalize": False},
    "Gemma3TextModel": {"dense": ((96, "Identity"), (48, "Identity"))},
}
BIDIRECTIONAL = {"Gemma3TextModel": {"use_bidirectional_attention": True}}


def exported(folder: Path) -> ExportResult:
    return export(folder, folder.with_name("onnx"), ExportOptions("fp32", "cpu"), progress=Silent())


def made(bert: Path, folder: Path, modules: Modules) -> Path:
    shutil.copytree(bert, folder)
    save_modules(folder, 64, **modules)
    return folder


@pytest.mark.parametrize("pooling", daily(POOLINGS, ["all, dense"]))
def test_graph_gives_embedding_of_modules(pooling: str, bert: Path, tmp_path: Path) -> None:
    folder = made(bert, tmp_path / "model", POOLINGS[pooling])
    result = exported(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    assert worst(result.model, folder, model) < 1e-5
    assert result.task == "feature-extraction"
    kinds = json.loads((result.output / "export.json").read_text())["sentence_modules"]
    assert kinds[:2] == ["Transformer", "Pooling"] and "Dense" in kinds
    proof = verdict(result, folder)
    assert proof["passed"] and proof["cases"] >= 3
    settings = folder / "2_Dense" / "config.json"
    settings.write_text(settings.read_text().replace("activation.Tanh", "activation.ReLU").replace("GELU", "ReLU"))
    proof = verdict(result, folder)
    assert (proof["passed"], proof["output"]) == (False, "sentence_embedding")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", MODES)
def test_pooling_leaves_out_padding(mode: str, side: str) -> None:
    """weightedmean counts places, those of padding on the left as well: so does sentence-transformers."""
    torch.manual_seed(1)
    rows = [torch.randn(n, 8) for n in (5, 2, 7)]
    ends = [(7 - len(r), 0) if side == "left" else (0, 7 - len(r)) for r in rows]
    states = torch.stack(
        [torch.nn.functional.pad(r, (0, 0, *e), value=50.0) for r, e in zip(rows, ends, strict=True)]
    )
    mask = torch.stack(
        [torch.nn.functional.pad(torch.ones(len(r)).long(), e) for r, e in zip(rows, ends, strict=True)]
    )
    found = Pooling((sentence_modules.MODES[mode],))(states, mask)
    if mode == "weightedmean_tokens" and side == "left":
        weights = mask * torch.arange(1, 8)
        wanted = (states * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
    else:
        wanted = torch.stack([pooled(row, mode) for row in rows])
    torch.testing.assert_close(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("cls", DECODERS)
def test_decoder_with_modules_embeds(cls: str, tmp_path: Path) -> None:
    """Whichever side is padded, and although config.json names a class with a language model's head."""
    folder = tmp_path / "model"
    Row(cls, BIDIRECTIONAL.get(cls, {})).save(folder)
    save_modules(folder, 48, **DECODERS[cls])
    result = exported(folder)
    assert (result.engine, result.task) == ("dynamo", "feature-extraction")
    body = transformers.AutoModel.from_pretrained(folder).eval()
    sides = ("right",) if DECODERS[cls].get("modes") == ("weightedmean_tokens",) else ("right", "left")
    assert worst(result.model, folder, body, sides) < 1e-5


def test_reweighted_dense_is_a_fresh_export(bert: Path, tmp_path: Path) -> None:
    folder = made(bert, tmp_path / "a" / "model", POOLINGS["dense, normalized"])
    other = shutil.copytree(folder, tmp_path / "b" / "model")
    changed = torch.nn.Linear(64, 40)
    weights = {"linear.weight": changed.weight.data.contiguous(), "linear.bias": changed.bias.data.contiguous()}
    save_file(weights, other / "2_Dense" / "model.safetensors")
    first, fresh = exported(folder), exported(other)
    again = reweight(first.output, other, tmp_path / "again", progress=Silent())
    data = [(r.output / "model.onnx_data").read_bytes() for r in (first, fresh, again)]
    assert data[1] == data[2] != data[0]
    assert (again.output / "2_Dense" / "model.safetensors").read_bytes() == (
        other / "2_Dense" / "model.safetensors"
    ).read_bytes()
    described = json.loads((first.output / "weights-map.json").read_text())
    assert "2_Dense.linear.weight" in {p["tensor"] for w in described["weights"] for p in w["made_of"]}


def _lstm(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules[-1]["type"] = "sentence_transformers.models.LSTM"
    (folder / "modules.json").write_text(json.dumps(modules))


def _pickled(folder: Path) -> None:
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")


def _missing(folder: Path) -> None:
    (folder / "2_Dense" / "model.safetensors").unlink()


@pytest.mark.parametrize("change", [_lstm, _pickled, _missing])
def test_module_that_no_graph_holds_is_refused(change: Callable[[Path], None], bert: Path, tmp_path: Path) -> None:
    folder = made(bert, tmp_path / "model", POOLINGS["dense, normalized"])
    change(folder)
    with pytest.raises(LoraExportError, match=r"LSTM|pickled|missing"):
        exported(folder)
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize(
    ("settings", "types"),
    [
        ({"tokenizer_class": "XLMRobertaTokenizer"}, False),
        ({"tokenizer_class": "BertTokenizer"}, True),
        ({"tokenizer_class": "BertTokenizer", "model_input_names": ["input_ids", "attention_mask"]}, False),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, True),
        (None, True),
    ],
)
def test_graph_takes_token_types_where_tokenizer_makes_them(
    settings: dict[str, Any] | None, types: bool, bert: Path, tmp_path: Path
) -> None:
    model = transformers.AutoModel.from_pretrained(bert)
    model.name_or_path = str(tmp_path)
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (first, *_) = forward_inputs.calls(model, "feature-extraction")
    assert ("token_type_ids" in first.inputs) == types


def test_prompt_outside_pooling_leaves_states_alone(bert: Path, tmp_path: Path) -> None:
    """A graph is not told where a prompt ends."""
    folder = made(bert, tmp_path / "model", {"settings": {"include_prompt": False}})
    graph = exported(folder)
    model = onnx.load(graph.model, load_external_data=False)
    assert [o.name for o in model.graph.output] == ["last_hidden_state"]
