"""A base gets the modules that only the adapter's folder has, so that its graph is the merged model's."""

from pathlib import Path

import transformers

from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.onnx_export.refusals import read_config
from lora_export.progress import Silent
from lora_export.sentence_modules import modules_of
from lora_export.workflows.trained_base import modules_from, prepared_base
from tests.builders import bert_config, lora, save_adapter, save_base
from tests.onnx_export.sentences import save_modules


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
