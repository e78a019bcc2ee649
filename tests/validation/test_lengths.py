"""On texts of which lengths models are compared: drawn, at windows and beyond them, and as long as a model can."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lora_export.contracts import AdapterChoice, ValidationOptions, ValidationResult
from lora_export.merging import merge
from lora_export.progress import Silent
from lora_export.storage.documents import as_json
from lora_export.validation import validate
from lora_export.validation.comparing import lengths
from lora_export.validation.comparing.tested_model import ModelUnderTest
from lora_export.validation.kinds import choose
from lora_export.validation.kinds.texts import positions
from lora_export.validation.run import seeded
from tests.builders import edit_json, gpt2_config, llama_config, save_base
from tests.validation.conftest import save_adapter, save_tokenizer
from tests.validation.models import BODY, MODELS


def llama(**changes: Any) -> Any:
    return transformers.LlamaForCausalLM(llama_config(**{"max_position_embeddings": 400} | changes))


SHORT = BODY | {"max_position_embeddings": 300}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6, "long_factor": [2.0] * 6,
    "original_max_position_embeddings": 100, "factor": 4.0,
}  # fmt: skip


def test_choose_another_seed_draws_other_lengths() -> None:
    model = llama()
    drawn = [lengths.choose(model, seed, 101) for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1] and len({d.tokens for d in drawn}) == 3
    assert "drawn with seed 2" in drawn[2].words
    assert all(d.tokens[-1] == 400 for d in drawn)  # all its positions


@pytest.mark.parametrize(
    ("config", "mark"),
    [
        (transformers.MistralConfig(**SHORT, sliding_window=90), 90),
        (llama_config(max_position_embeddings=400, rope_parameters=LONGROPE), 100),
        (
            transformers.ModernBertConfig(**SHORT, local_attention=64, pad_token_id=0),
            64,
        ),
    ],
    ids=["window", "rope", "local attention"],
)
def test_choose_windows_and_original_ropes_are_reached_and_passed(config: Any, mark: int) -> None:
    cls: Any = transformers.AutoModel._model_mapping[type(config)]
    with torch.device("meta"):
        model = cls(config)
    tokens = lengths.choose(model, 7, 101).tokens
    assert {mark, mark + 1} <= set(tokens)
    assert any(mark + 1 < n <= mark + 2 + mark // 4 for n in tokens)


def test_choose_a_window_that_is_switched_off_is_none() -> None:
    config = transformers.Qwen2Config(**SHORT, sliding_window=90)
    assert lengths.marks(config) == {}
    config.use_sliding_window, config.sliding_window = True, 90
    assert lengths.marks(config) == {"sliding_window": 90}


def test_choose_what_is_too_long_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "MOST_ARITHMETIC", 1)
    monkeypatch.setattr(lengths, "DRAWN_ARITHMETIC", 1)
    config = transformers.MistralConfig(**BODY | {"max_position_embeddings": 9000}, sliding_window=4096)
    chosen = lengths.choose(transformers.MistralForCausalLM(config), 7, 101)
    assert max(chosen.tokens) <= lengths.LEAST
    assert "too long to run here, where 64 tokens are the most: sliding_window 4,096" in chosen.words
    assert "the last of 9,000 positions" in chosen.words


@pytest.mark.parametrize("most", [2, 3, 9])
def test_choose_few_positions_are_enough(most: int) -> None:
    config = transformers.GPT2Config(**gpt2_config().to_diff_dict() | {"n_positions": most})
    model = transformers.GPT2LMHeadModel(config)
    chosen = lengths.choose(model, 7, 101)
    assert chosen.tokens and max(chosen.tokens) == most
    for n in chosen.tokens:
        assert model(input_ids=torch.ones(1, n, dtype=torch.long)).logits.shape[1] == n


def test_positions_a_large_padding_id_takes_none_away() -> None:
    """Models count positions from zero, unless their table says otherwise: prompts had eight tokens left."""
    assert positions(llama(pad_token_id=99, max_position_embeddings=100), room=20) == 80
    roberta = MODELS["roberta"].model(MODELS["roberta"].config())  # 80 positions from its padding id 1 on
    assert positions(roberta, room=0) == 78


@pytest.mark.parametrize("name", ["gpt2", "bert", "bart", "t5", "clip", "whisper"])
def test_comparison_the_drawn_lengths_are_run(name: str, tmp_path: Path) -> None:
    tiny = MODELS[name]
    model = tiny.model(tiny.config())
    subject = ModelUnderTest(model, tmp_path, {}, ("A prompt",), "Words.", ValidationOptions(seed=11), Silent())
    comparison: Any = choose(model).comparison(subject)
    run = set(lengths.choose(model, 11, tiny.config().get_text_config().vocab_size).tokens)
    batches = getattr(comparison, "batches", ())
    used: list[Any] = [*getattr(comparison, "tokens", ()), *(b.get("input_ids") for b in batches)]
    found = {t.shape[-1] for t in used if t is not None}
    if name == "whisper":  # its texts are the decoder's, begun by a token of their own
        run = {n + 1 for n in run} | {tiny.config().max_target_positions}
        assert found & run
    elif name == "clip":  # one padded batch
        assert max(run) in found
    else:
        assert run <= found
    assert "drawn with seed 11" in comparison.note


def test_seeded_is_another_seed_each_time_unless_it_is_given() -> None:
    drawn = {seeded(ValidationOptions()).seed for _ in range(4)}
    assert len(drawn) > 1 and None not in drawn
    assert seeded(ValidationOptions(seed=5)).seed == 5


# --- what a changed window does ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A Mistral whose window is longer than any built-in prompt."""
    root = tmp_path_factory.mktemp("windowed")
    config = transformers.MistralConfig(
        vocab_size=320, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, sliding_window=100, max_position_embeddings=140, initializer_range=0.2,
    )  # fmt: skip
    base = save_base(root / "base", transformers.MistralForCausalLM, config, torch.float32)
    save_tokenizer(base)
    merge(base, [AdapterChoice(save_adapter(base, root / "adapter"))], root / "merged")
    (root / "prompts").write_text("A prompt.\n")
    (root / "text").write_text("A text of which longer ones are made, forty letters or more.")
    return {"base": base, "adapter": root / "adapter", "merged": root / "merged", "root": root}


def judged(folders: Mapping[str, Path], merged: Path) -> ValidationResult:
    root = folders["root"]
    options = ValidationOptions(prompts=root / "prompts", text=root / "text", provider="cpu")
    return validate(
        folders["base"], [AdapterChoice(folders["adapter"])], merged, options=options, progress=Silent()
    )


def test_validate_a_smaller_window_shows_in_settings_and_outputs(
    windowed: Mapping[str, Path], tmp_path: Path
) -> None:
    merged = shutil.copytree(windowed["merged"], tmp_path / "merged")
    honest = judged(windowed, merged)
    assert honest.passed, [c for c in honest.checks if not c.passed]
    assert honest.seed is not None and f"seed {honest.seed}" in honest.checks[0].note
    assert as_json(honest)["seed"] == honest.seed
    edit_json(merged / "config.json", sliding_window=80)
    result = judged(windowed, merged)
    assert {"settings_differ", "logits_max_abs"} <= {c.name for c in result.checks if not c.passed}
