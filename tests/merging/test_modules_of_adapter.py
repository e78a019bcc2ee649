"""A base gets the modules that only the adapter's folder has, so that its graph is the merged model's."""

from pathlib import Path

import pytest
import transformers

from lora_export.checkpoint import open_checkpoint
from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.errors import CheckpointError
from lora_export.merging.planning.completeness import refuse_incomplete
from lora_export.onnx_export.refusals import read_config
from lora_export.progress import Silent
from lora_export.sentence_modules import modules_of
from lora_export.workflows.trained_base import modules_from, prepared_base
from tests.builders import bert_config, edit_json, lora, save_adapter, save_base
from tests.onnx_export.sentences import save_modules


def test_embedder_stored_as_language_model_needs_no_head(tmp_path: Path) -> None:
    """As a trainer saves Qwen3ForCausalLM without the head that an embedder has no use for."""
    config = transformers.Qwen3Config(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.Qwen3Model(config).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", architectures=["Qwen3ForCausalLM"])
    base = open_checkpoint(tmp_path)
    shapes = {f"model.{name}": info.shape for name, info in base.tensors.items()}
    with pytest.raises(CheckpointError, match="lm_head"):
        refuse_incomplete(base, shapes, {})
    save_modules(tmp_path, 16, ("lasttoken",))
    refuse_incomplete(base, shapes, {})
    del shapes["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match="up_proj"):
        refuse_incomplete(base, shapes, {})


def test_prepared_base_takes_modules_of_adapter(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", transformers.BertModel, bert_config())
    adapter = save_adapter(tmp_path / "adapter", base, lora(target_modules=["query"]), transformers.BertModel)
    save_modules(adapter, 48, ("mean_tokens",), ((8, "Tanh"),))
    choices = [AdapterChoice(adapter)]
    assert modules_from(base, choices) == adapter
    prepared = prepared_base(base, choices, MergeOptions(), tmp_path / "work", Silent())
    assert prepared != base and not modules_of(base)
    assert [m.kind for m in modules_of(prepared)] == ["Transformer", "Pooling", "Dense", "Normalize"]
    weights = "model.safetensors"
    assert (prepared / weights).samefile(base / weights)
    assert (prepared / "2_Dense" / weights).samefile(adapter / "2_Dense" / weights)
    assert read_config(prepared) != read_config(base)
