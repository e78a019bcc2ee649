"""Vocabularies that training resized, in the ways that PEFT saves them; rows that nobody saved are not made up."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.errors import AdapterError
from lora_export.merging import plan
from lora_export.merging.planning.vocabulary import resizings, side_effects
from lora_export.storage.sealed import read_json
from tests.builders import edit_json, tensors
from tests.daily import daily
from tests.merging.tied_models import Cell

NEW = [101, 102, 103, 104]
ROWS = {"trainable_token_indices": {"EMBEDDING": NEW}}
ROWS_OF_BOTH = {"trainable_token_indices": {"EMBEDDING": NEW, "HEAD": NEW}}
ON_HEAD, ON_EMBEDDING = {"target_modules": ["HEAD"]}, {"target_modules": ["EMBEDDING"]}
BOTH = {"modules_to_save": ["EMBEDDING", "HEAD"]}
PLAIN: dict[str, Any] = {}
CELLS = [
    Cell("llama", ROWS, 105, False),  # rows alone
    Cell("llama", ROWS, 105), Cell("bert", PLAIN, 105), Cell("t5", PLAIN, 105), Cell("bart", BOTH, 105),
    Cell("gemma3", ROWS, 105, False), Cell("bart", ON_HEAD, 97, False), Cell("llama", ON_HEAD, 105),
    Cell("untied llama", ROWS_OF_BOTH, 105, False), Cell("untied llama", PLAIN, 112), Cell("t5", BOTH, 105),
    Cell("untied llama", ON_EMBEDDING, 97, False), Cell("bert", ON_EMBEDDING, 105), Cell("bert", BOTH, 105),
    Cell("bert", ROWS, 105, False), Cell("t5", ROWS, 105), Cell("t5", ON_HEAD, 105), Cell("bart", PLAIN, 105),
    Cell("mamba", PLAIN, 112), Cell("mamba", ON_EMBEDDING, 105), Cell("gemma3", BOTH, 105),
    Cell("gpt2", PLAIN, 105), Cell("whisper decoder", PLAIN, 105), Cell("zamba", BOTH, 105),
    Cell("untied llama", BOTH, 97),
]  # fmt: skip
EVERY_DAY = CELLS[:7]


@pytest.mark.parametrize("cell", daily(CELLS, EVERY_DAY), ids=str)
def test_resized_vocabulary_equals_unmerged_model(cell: Cell, tmp_path: Path) -> None:
    cell.make(tmp_path)
    cell.merge(tmp_path)
    assert cell.error(tmp_path) < 3e-6


def refused(tmp_path: Path, cell: Cell) -> str:
    cell.make(tmp_path)
    with pytest.raises(AdapterError) as caught:
        plan(tmp_path / "base", [AdapterChoice(tmp_path / "adapter")], MergeOptions())
    return str(caught.value).replace(str(tmp_path), "")


def test_resized_embedding_rows_not_saved_are_refused(tmp_path: Path) -> None:
    assert refused(tmp_path, Cell("untied llama", ON_HEAD, 105)) == (
        "the vocabulary was resized to 105, but this tensor still has 101 rows, and the adapter does not hold the "
        "others\n"
        "  file:     /adapter\n"
        "  tensor:   model.embed_tokens.weight\n"
        "  expected: 105 rows in the adapter, or in the base\n"
        "  try:      give as -b the base that training resized (save_pretrained before training), or train with "
        "this module in modules_to_save"
    )


def test_resized_head_rows_not_saved_are_refused(tmp_path: Path) -> None:
    assert refused(tmp_path, Cell("untied llama", ROWS, 105, False)).endswith(
        "  tensor:   lm_head.weight\n"
        "  expected: 105 rows in the adapter, or in the base\n"
        "  try:      save the adapter again: model.save_pretrained(DIR, save_embedding_layers=True), or give the "
        "resized base as -b"
    )


def test_resized_gap_row_is_refused(tmp_path: Path) -> None:
    cell = Cell("llama", {"trainable_token_indices": {"EMBEDDING": [101, 104, 102]}}, 105, False)
    assert refused(tmp_path, cell) == (
        "the token 104 is trained, the base has 101 rows, and the adapter does not hold the row 103\n"
        "  file:     /adapter\n"
        "  tensor:   model.embed_tokens.weight\n"
        "  expected: every row from 101 on, or the base with the vocabulary that training had\n"
        "  try:      save the adapter again with save_embedding_layers=True, or give the resized base as -b"
    )


def test_resized_head_bias_not_saved_is_refused(tmp_path: Path) -> None:
    cell = Cell("bert", {"modules_to_save": ["EMBEDDING"]}, 105, False)
    assert "still has 101 rows" in refused(tmp_path, cell)


def test_resized_rows_follow_old_ones(tmp_path: Path) -> None:
    cell = Cell("llama", ROWS, 105, False)
    cell.make(tmp_path)
    cell.merge(tmp_path)
    name = "model.embed_tokens"
    trained = tensors(tmp_path / "adapter")[f"base_model.model.{name}.token_adapter.trainable_tokens_delta"]
    written = tensors(tmp_path / "out")[f"{name}.weight"]
    assert torch.equal(written[:101], tensors(tmp_path / "base")[f"{name}.weight"])
    assert torch.equal(written[101:], trained)
    assert read_json(tmp_path / "out/config.json")["vocab_size"] == 105


def test_resized_text_model_settings_and_tokenizer_follow(tmp_path: Path) -> None:
    cell = Cell("gemma3", ROWS, 105, False)
    cell.make(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "adapter" / file).write_text('{"of": "the adapter"}')
    warnings = cell.merge(tmp_path).warnings
    before, after = (read_json(tmp_path / f / "config.json") for f in ("base", "out"))
    assert after["text_config"] == before["text_config"] | {"vocab_size": 105}
    assert "vocab_size" not in after and "tokenizer" in " ".join(warnings)
    assert (tmp_path / "out/tokenizer.json").read_text() == '{"of": "the adapter"}'


def test_resized_unknown_architecture_uses_usual_names(tmp_path: Path) -> None:
    cell = Cell("untied llama", BOTH, 105)
    cell.make(tmp_path)
    edit_json(tmp_path / "base/config.json", model_type="of_nobody", architectures=["NobodyForCausalLM"])
    planned = plan(tmp_path / "base", [AdapterChoice(tmp_path / "adapter")], MergeOptions())
    assert planned.config_changes == {"vocab_size": 105}
    assert {t.shape for n, t in planned.tensors.items() if "lm_head" in n or "embed" in n} == {(105, 48)}


def test_resized_vocabulary_changes_settings() -> None:
    config = {"vocab_size": 101, "text_config": {"vocab_size": 101}, "q_former": {"vocab_size": 7}}
    first, own, *_ = resizings(config, ("text_config",), 101, 105)
    assert first == {"vocab_size": 105, "text_config": {"vocab_size": 105}, "q_former": {"vocab_size": 7}}
    assert own == {"vocab_size": 101, "text_config": {"vocab_size": 105}, "q_former": {"vocab_size": 7}}
    assert config["text_config"] == {"vocab_size": 101}
    assert next(iter(resizings({}, ("text",), 101, 105))) == {"text": {"vocab_size": 105}}


def test_resized_dependent_settings_follow() -> None:
    """As scale_decoder_outputs of T5 follows tie_word_embeddings."""
    before = {"tie_word_embeddings": True, "scale": True, "text": {"vocab_size": 101}}
    assert not side_effects(before, before | {"tie_word_embeddings": False, "text": {"vocab_size": 105}})
    assert side_effects(before, before | {"scale": False})
