"""What lies beside the weights, and tensors that a model does not read: as base and adapters have them, or a failed
check that names file and key."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_export.contracts import AdapterChoice, Check, MergeOptions
from lora_export.merging import merge
from lora_export.validation.folder.companions import declared, expected_folder
from lora_export.validation.folder.settings import settings_check
from lora_export.validation.folder.stored import Changed, stored_check
from tests.builders import edit_json, edit_tensors, save_base
from tests.builders import save_adapter as save_any_adapter
from tests.validation.conftest import failed, judged, save_adapter, save_tokenizer
from tests.validation.models import MODELS

Spoil = Callable[[Path], None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(base, adapter, merged): a Mistral with a window, a tokenizer, a chat template and a generation config."""
    root = tmp_path_factory.mktemp("settings")
    config = transformers.MistralConfig(
        vocab_size=320, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, sliding_window=96, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    base = save_base(root / "base", transformers.MistralForCausalLM, config, torch.bfloat16)
    save_tokenizer(base)
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "README.md").write_text("Words.")
    edit_json(base / "generation_config.json", temperature=0.6)
    merge(base, [AdapterChoice(save_adapter(base, root / "adapter"))], root / "merged")
    return base, root / "adapter", root / "merged"


def found(made: tuple[Path, Path, Path], merged: Path, folder: Path, options: MergeOptions | None = None) -> Check:
    expected = expected_folder(made[0], [AdapterChoice(made[1])], merged, options or MergeOptions(), folder)
    return settings_check(expected, merged)


def shuffled_tokenizer(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    ids = list(words.values())
    tokenizer["model"]["vocab"] = dict(zip(words, ids[1:] + ids[:1], strict=True))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def other_end(folder: Path) -> None:
    edit_json(folder / "generation_config.json", eos_token_id=7)


def other_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }} And obey.")


def other_window(folder: Path) -> None:
    edit_json(folder / "config.json", sliding_window=20)


def end_twice(folder: Path) -> None:
    text = (folder / "generation_config.json").read_text()
    (folder / "generation_config.json").write_text(text.replace("{", '{"temperature": 2.0,', 1))


def planted_adapter(folder: Path) -> None:
    """transformers attaches it while it loads the folder."""
    (folder / "adapter_config.json").write_text("{}")


def planted_pickle(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"")


def planted_template(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")


def no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


CASES: list[tuple[Any, str]] = [
    (shuffled_tokenizer, "tokenizer.json: model.vocab"),
    (other_end, "generation_config.json: eos_token_id: should be 2, is 7"),
    (other_template, "chat_template.jinja: different contents"),
    (other_window, "config.json: sliding_window: should be 96, is 20"),
    (planted_adapter, "adapter_config.json: neither"),
    (planted_pickle, "pytorch_model.bin: neither"),
    (planted_template, "additional_chat_templates/tool_use.jinja: neither"),
    (no_template, "chat_template.jinja: missing"),
]


@pytest.mark.parametrize(("spoil", "said"), CASES, ids=[spoil.__name__ for spoil, _ in CASES])
def test_settings_check_a_changed_file_is_named_with_its_key(
    made: tuple[Path, Path, Path], tmp_path: Path, spoil: Spoil, said: str
) -> None:
    merged = shutil.copytree(made[2], tmp_path / "merged")
    assert found(made, merged, tmp_path / "before").passed
    spoil(merged)
    check = found(made, merged, tmp_path / "after")
    assert not check.passed and check.value == 1 and check.threshold == 0
    assert said in check.note


def test_settings_check_a_key_that_stands_twice_is_refused(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Loaders disagree on which of the two counts."""
    from lora_export.errors import InputError

    merged = shutil.copytree(made[2], tmp_path / "merged")
    end_twice(merged)
    with pytest.raises(InputError, match="a key appears twice"):
        found(made, merged, tmp_path / "after")


def test_settings_check_documents_and_who_wrote_it_do_not_count(
    made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    merged = shutil.copytree(made[2], tmp_path / "merged")
    (merged / "README.md").write_text("Other words.")
    (merged / "LICENSE.txt").write_text("Terms.")
    edit_json(merged / "config.json", transformers_version="4.0.0")
    assert found(made, merged, tmp_path / "after").passed


def test_settings_check_a_type_that_was_not_asked_for_is_named(
    made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    merge(made[0], [AdapterChoice(made[1])], tmp_path / "merged", MergeOptions(dtype="float16"))
    for i, (asked, passes) in enumerate((("float16", True), ("keep", True), ("float32", False))):
        options = declared(made[0], tmp_path / "merged", MergeOptions(dtype=asked))  # type: ignore[arg-type]
        assert options.dtype == ("float32" if asked == "float32" else "float16")
        assert found(made, tmp_path / "merged", tmp_path / f"{i}", options).passed == passes
    edit_json(made[2] / "config.json", dtype="float16")  # says so alone: the tensors are bfloat16 still
    options = declared(made[0], made[2], MergeOptions())
    edit_json(made[2] / "config.json", dtype="bfloat16")
    assert "stored as BF16, should be F16" in stored_check(made[0], made[2], CHANGED, options, False).note


def test_settings_check_an_adapter_s_tokenizer_takes_the_place_of_the_base_s(
    made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, adapter, _ = made
    own = shutil.copytree(adapter, tmp_path / "adapter")
    shutil.copy(base / "tokenizer.json", own)
    shuffled_tokenizer(own)
    merge(base, [AdapterChoice(own)], tmp_path / "merged")
    assert found((base, own, Path()), tmp_path / "merged", tmp_path / "a").passed
    shutil.copy(base / "tokenizer.json", tmp_path / "merged")
    assert "tokenizer.json" in found((base, own, Path()), tmp_path / "merged", tmp_path / "b").note


def test_settings_check_untied_and_resized_models_pass(tmp_path: Path) -> None:
    for name, rows, more in (("untied", None, {"target_modules": ["lm_head"]}), ("resized", 110, {})):
        root = tmp_path / name
        tied = name == "untied"
        base = save_base(root / "base", config=transformers.LlamaConfig(**LLAMA, tie_word_embeddings=tied))
        lora = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | more)
        adapter = save_any_adapter(root / "adapter", base, lora, rows=rows)
        merge(base, [AdapterChoice(adapter)], root / "merged")
        check = found((base, adapter, Path()), root / "merged", root / "expected")
        assert check.passed, check
        edit_json(root / "merged" / "config.json", vocab_size=90)
        assert not found((base, adapter, Path()), root / "merged", root / "again").passed


LLAMA: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip


def test_validate_the_merged_folder_does_not_choose_its_inputs(
    made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """A shuffled tokenizer leaves the outputs on the reference's inputs as they were, and fails by itself."""
    merged = shutil.copytree(made[2], tmp_path / "merged")
    honest = judged(*made[:2], merged, seed=3)
    assert honest.passed, [c for c in honest.checks if not c.passed]
    shuffled_tokenizer(merged)
    result = judged(*made[:2], merged, seed=3)
    assert [c.name for c in result.checks if not c.passed] == ["settings_differ"]
    values = {c.name: c.value for c in honest.checks} | {"settings_differ": 1}
    assert values == {c.name: c.value for c in result.checks}


# --- tensors of the files ----------------------------------------------------------------------------------------

UNTOUCHED, TOUCHED = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.self_attn.q_proj.weight"
CHANGED = Changed([f"model.layers.{i}.{m}" for i in (0, 1) for m in (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")], (), {})  # fmt: skip


def stored(made: tuple[Path, Path, Path], merged: Path, **options: Any) -> Check:
    return stored_check(made[0], merged, CHANGED, MergeOptions(**options), replicated=False)


def one_bit(state: dict[str, torch.Tensor]) -> None:
    state[UNTOUCHED].view(torch.int16)[3, 5] ^= 1


def widened(state: dict[str, torch.Tensor]) -> None:
    """Cast to one type when it is loaded, so a model shows no trace of it."""
    state[UNTOUCHED] = state[UNTOUCHED].float() * 1.000001


def lacking(state: dict[str, torch.Tensor]) -> None:
    del state[UNTOUCHED]


def in_excess(state: dict[str, torch.Tensor]) -> None:
    state["model.layers.2.mlp.gate_proj.weight"] = state[UNTOUCHED].clone()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (one_bit, f"{UNTOUCHED}: no adapter touches it"),
        (widened, f"{UNTOUCHED}: stored as F32, should be BF16"),
        (lacking, f"{UNTOUCHED}: missing"),
        (in_excess, "model.layers.2.mlp.gate_proj.weight: neither"),
    ],
)
def test_stored_check_a_tensor_that_no_adapter_touches_is_named(
    made: tuple[Path, Path, Path], tmp_path: Path, spoil: Callable[[dict[str, torch.Tensor]], None], said: str
) -> None:
    merged = shutil.copytree(made[2], tmp_path / "merged")
    assert stored(made, merged).passed
    state = load_file(merged / "model.safetensors")
    spoil(state)
    save_file(state, merged / "model.safetensors", metadata={"format": "pt"})
    check = stored(made, merged)
    assert not check.passed and check.value == 1 and said in check.note


def test_stored_check_a_second_file_with_the_same_tensor_is_named(
    made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    merged = shutil.copytree(made[2], tmp_path / "merged")
    save_file({TOUCHED: torch.zeros(48, 48)}, merged / "other.safetensors")
    assert f"{TOUCHED}: in model.safetensors and in other.safetensors" in stored(made, merged).note


def test_stored_check_after_a_conversion_the_rounded_values_count(
    made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    merge(made[0], [AdapterChoice(made[1])], tmp_path / "merged", MergeOptions(dtype="float16"))
    assert stored(made, tmp_path / "merged", dtype="float16").passed
    edit_tensors(tmp_path / "merged/model.safetensors", {"model.norm.weight": torch.ones(48, dtype=torch.float16)})
    assert "model.norm.weight" in stored(made, tmp_path / "merged", dtype="float16").note


def test_validate_a_tensor_that_the_class_does_not_read_is_compared(tmp_path: Path) -> None:
    """A head, which is no part of the class that the adapter was trained on."""
    headed, bare = MODELS["bert tokens"], MODELS["bert"]
    base = headed.save(tmp_path / "base", torch.float32)
    adapter = bare.train(base, tmp_path / "adapter")
    merged = tmp_path / "merged"
    merge(base, [AdapterChoice(adapter)], merged)
    state = load_file(merged / "model.safetensors")
    edit_tensors(merged / "model.safetensors", {"classifier.weight": state["classifier.weight"] * 1.5})
    (check,) = failed(judged(base, adapter, merged))
    assert check.name == "stored_tensors_differ" and "classifier.weight" in check.note
