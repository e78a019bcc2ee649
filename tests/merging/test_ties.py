"""Weights that several names share: what one adapter changes of them, all names or one, is what PEFT changes."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.merging import plan
from lora_export.merging.architecture import model as architecture
from lora_export.merging.planning.ties import may_be_shared, shared_by_usual_names
from tests.builders import edit_json, edit_tensors, llama_config, lora, save_adapter, save_base, tensors
from tests.daily import daily
from tests.merging.tied_models import Cell

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ON_EMBEDDING = {"target_modules": ["EMBEDDING"]}
ON_HEAD = {"target_modules": ["HEAD"]}
SAVED = {"modules_to_save": ["HEAD"]}
BOTH = {"modules_to_save": ["EMBEDDING", "HEAD"]}
TOKENS = {"trainable_token_indices": {"EMBEDDING": [11, 60]}}
OTHERS = {"trainable_token_indices": {"EMBEDDING": [11, 60], "HEAD": [7, 8]}}
SHARED = {"target_modules": r".*layers\.4\.shared_transf\.self_attn\.q_proj"}
CELLS = [
    Cell("mamba", ON_EMBEDDING), Cell("bert", ON_HEAD), Cell("t5", ON_HEAD), Cell("gemma3", SAVED),
    Cell("zamba", SAVED), Cell("zamba", SHARED), Cell("whisper decoder", SAVED), Cell("bart", ON_EMBEDDING),
    Cell("gpt2", OTHERS), Cell("bert", TOKENS), Cell("bert", BOTH | {"ensure_weight_tying": True}),
    Cell("llama", BOTH | {"ensure_weight_tying": True}),
    Cell("llama", {"target_modules": ["EMBEDDING", "HEAD"], "ensure_weight_tying": True}),
    Cell("bert", BOTH), Cell("bert", {"bias": "all"}), Cell("mamba", ON_HEAD), Cell("gemma3", ON_EMBEDDING),
    Cell("t5", BOTH), Cell("t5", TOKENS), Cell("bart", SAVED),
    Cell("llama", {"trainable_token_indices": {"HEAD": [11, 60]}}),
]  # fmt: skip
EVERY_DAY = [CELLS[i] for i in (0, 1, 2, 3, 4, 5, 9)]


@pytest.mark.parametrize("cell", daily(CELLS, EVERY_DAY), ids=str)
def test_tied_merge_equals_unmerged_model(cell: Cell, tmp_path: Path) -> None:
    cell.make(tmp_path)
    cell.merge(tmp_path)
    assert cell.error(tmp_path) < 3e-6


@pytest.mark.parametrize("settings", [BOTH, {"target_modules": ["EMBEDDING", "HEAD"]}])
def test_tied_weights_changed_alike_stay_tied(settings: dict[str, Any], tmp_path: Path) -> None:
    cell = Cell("llama", settings | {"ensure_weight_tying": True})
    cell.make(tmp_path)
    cell.merge(tmp_path)
    assert tensors(tmp_path / "out").keys() == tensors(tmp_path / "base").keys()
    assert (tmp_path / "out/config.json").read_bytes() == (tmp_path / "base/config.json").read_bytes()


def test_tie_without_setting_is_cut_by_files_and_reported(tmp_path: Path) -> None:
    """T5 takes tie_word_embeddings for another thing, and always ties."""
    cell = Cell("t5", ON_HEAD)
    cell.make(tmp_path)
    (told,) = (w for w in cell.merge(tmp_path).warnings if "ties" in w)
    assert told.startswith("T5ForConditionalGeneration ties decoder.embed_tokens.weight and ")
    assert told.endswith("all are stored, and transformers 5 does not tie them, 4 does")
    written = tensors(tmp_path / "out")
    assert torch.equal(written["decoder.embed_tokens.weight"], written["shared.weight"])
    assert not torch.equal(written["lm_head.weight"], written["shared.weight"])


def test_tied_names_with_different_numbers_are_two_weights(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", config=llama_config(tied=True))
    edit_tensors(base / "model.safetensors", {HEAD: tensors(base)[EMBEDDING] * 2})
    save_adapter(tmp_path / "adapter", base, lora(trainable_token_indices=[5]))
    planned = plan(base, [AdapterChoice(tmp_path / "adapter")], MergeOptions())
    assert (planned.tensors[EMBEDDING].operation, planned.tensors[HEAD].operation) == ("updated", "copied")


def test_ties_of_unknown_architecture_use_usual_names(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", config=llama_config(tied=True))
    save_adapter(tmp_path / "adapter", base, lora(target_modules=["lm_head", "q_proj"]))
    edit_json(base / "config.json", model_type="of_nobody", architectures=["NobodyForCausalLM"])
    planned = plan(base, [AdapterChoice(tmp_path / "adapter")], MergeOptions())
    assert [len(planned.tensors[n].updates) for n in (EMBEDDING, HEAD)] == [1, 2]  # the head's copy, and LoRA
    assert planned.config_changes == {"tie_word_embeddings": False}
    assert any("by the usual names alone" in w for w in planned.warnings)


def test_plain_layers_do_not_build_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To build it takes seconds, most of a merge's time."""
    base = save_base(tmp_path / "base", config=llama_config(tied=True))
    save_adapter(tmp_path / "adapter", base, lora(bias="none"))
    monkeypatch.setattr(architecture, "_built", lambda *_: pytest.fail("the model was built"))
    assert plan(base, [AdapterChoice(tmp_path / "adapter")], MergeOptions()).counts["updated"] == 6


@pytest.mark.parametrize(
    ("changed", "asked"),
    [
        ("model.layers.1.q.weight", False), ("model.layers.3.q.weight", True), (EMBEDDING, True), (HEAD, True),
        ("model.layers.0.shared.weight", True), ("model.layers.0.experts.1.weight", False),
        ("vision.blocks.1.q.weight", False),
    ],
)  # fmt: skip
def test_architecture_is_built_only_when_needed(changed: str, asked: bool) -> None:
    stored = {f"model.layers.{i}.q.weight" for i in (0, 1, 2)} | {f"vision.blocks.{i}.q.weight" for i in (0, 1)}
    stored |= {f"model.layers.{i}.experts.{e}.weight" for i in (0, 1, 2) for e in (0, 1)}
    stored |= {"model.layers.0.shared.weight", EMBEDDING}
    assert may_be_shared({changed: []}, stored) == asked


@pytest.mark.parametrize(
    ("config", "stored", "found"),
    [
        ({"architectures": ["XForCausalLM"]}, [EMBEDDING], [(EMBEDDING, True), (HEAD, False)]),
        ({"architectures": ["XLMHeadModel"]}, [EMBEDDING, HEAD], [(EMBEDDING, True), (HEAD, True)]),
        ({"architectures": ["XForCausalLM"], "tie_word_embeddings": False}, [EMBEDDING], []),
        ({"architectures": ["XModel"]}, [EMBEDDING], []),
        ({}, [EMBEDDING], []),
        ({"architectures": ["XForCausalLM"]}, ["other.weight"], []),
    ],
)
def test_ties_usual_names_are_known(
    config: dict[str, Any], stored: list[str], found: list[tuple[str, bool]]
) -> None:
    base: Any = SimpleNamespace(config=config)
    groups = shared_by_usual_names(base, stored)
    assert [(m.name, m.stored) for g in groups for m in g.members] == found


def test_untied_weights_change_settings(tmp_path: Path) -> None:
    cell = Cell("gemma3", SAVED)
    cell.make(tmp_path)
    planned = plan(tmp_path / "base", [AdapterChoice(tmp_path / "adapter")], MergeOptions())
    assert planned.config_changes["tie_word_embeddings"] is False
    json.dumps(planned.config_changes)
