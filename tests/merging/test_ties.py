"""When a changed embedding has to be untied from its head, and when that cannot be done."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_export.contracts import TargetUpdate
from lora_export.errors import AdapterError
from lora_export.merging.ties import pair_to_untie

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
OTHER = "model.layers.0.mlp.up_proj.weight"
LLAMA = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
BERT = {"architectures": ["BertForMaskedLM"]}
WORDS = "bert.embeddings.word_embeddings.weight"


def update(target: str, tied: bool = False) -> TargetUpdate:
    return TargetUpdate(target, "lora", (), (), lambda shape: None, tied=tied)  # type: ignore[arg-type, return-value]


def pair(config: dict[str, Any], weights: tuple[str, ...], *updates: TargetUpdate) -> tuple[str, str] | None:
    base: Any = SimpleNamespace(config=config, folder=Path("BASE"))
    return pair_to_untie(base, dict.fromkeys(weights), {u.target: [u] for u in updates})


@pytest.mark.parametrize("config", [LLAMA, {"architectures": ["GPT2LMHeadModel"]}])  # without a word: tied
@pytest.mark.parametrize("stored", [(EMBEDDING,), (EMBEDDING, HEAD)])
def test_a_change_of_one_unties_the_pair(config: dict[str, Any], stored: tuple[str, ...]) -> None:
    assert pair(config, (*stored, OTHER), update(EMBEDDING)) == (EMBEDDING, HEAD)
    assert pair(config, (*stored, OTHER), update(HEAD)) == (EMBEDDING, HEAD)
    assert pair(config, (*stored, OTHER), update(EMBEDDING, tied=True), update(HEAD)) == (EMBEDDING, HEAD)


def test_what_changes_both_or_neither_does_not() -> None:
    assert pair(LLAMA, (EMBEDDING, OTHER), update(OTHER)) is None
    assert pair(LLAMA, (EMBEDDING, OTHER), update(EMBEDDING, tied=True)) is None
    assert pair(LLAMA | {"tie_word_embeddings": False}, (EMBEDDING, HEAD), update(EMBEDDING)) is None


def test_a_tie_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(AdapterError) as caught:
        pair(BERT, (WORDS, OTHER), update(WORDS))
    assert str(caught.value) == (
        "the adapter changes an embedding whose weight BertForMaskedLM also uses for its output\n"
        "  file:     BASE\n"
        f"  tensor:   {WORDS}\n"
        "  expected: an adapter that leaves the tied embedding alone, or a base without tied weights\n"
        "  try:      serve it unmerged with PEFT"
    )


@pytest.mark.parametrize(
    ("config", "weights", "changed"),
    [
        (BERT, (WORDS, OTHER), update(WORDS, tied=True)),
        (BERT, (WORDS, OTHER), update(OTHER)),
        (BERT, (WORDS, OTHER), update(WORDS.replace("weight", "bias"))),
        (BERT, (WORDS, HEAD), update(WORDS)),  # a head of its own is stored
        (BERT | {"tie_word_embeddings": False}, (WORDS, OTHER), update(WORDS)),
        ({"architectures": ["BertForSequenceClassification"]}, (WORDS, OTHER), update(WORDS)),
        ({"architectures": []}, (WORDS, OTHER), update(WORDS)),
        ({}, (WORDS, OTHER), update(WORDS)),
    ],
)
def test_other_embeddings_are_changed_as_they_are(
    config: dict[str, Any], weights: tuple[str, ...], changed: TargetUpdate
) -> None:
    assert pair(config, weights, changed) is None
