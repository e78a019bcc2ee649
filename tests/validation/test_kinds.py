"""Every kind of model through its own inputs: honest merges pass, spoiled ones fail and are named."""

import itertools
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.errors import AdapterError, InputError
from lora_export.merging import merge
from lora_export.progress import Silent
from lora_export.validation import ValidationOptions, kinds, validate
from lora_export.validation.comparing.seq2seq import edit_distance
from tests.daily import daily
from tests.validation.conftest import failed, judged, save_tokenizer
from tests.validation.models import MODELS

TYPES = ("float32", "bfloat16")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Path, Path]]:
    """(model, dtype) → (base, adapter), made when it is first asked for."""

    class Made(dict[tuple[str, str], tuple[Path, Path]]):
        def __missing__(self, key: tuple[str, str]) -> tuple[Path, Path]:
            root = tmp_path_factory.mktemp("kinds")
            base = MODELS[key[0]].save(root / "base", getattr(torch, key[1]))
            self[key] = base, MODELS[key[0]].train(base, root / "adapter")
            return self[key]

    return Made()


def spoil(merged: Path, part: str, factor: float) -> str:
    """Scales the one tensor whose name ends with `part`, and returns its name."""
    state = load_file(merged / "model.safetensors")
    name = next(n for n in state if n.endswith(part))
    state[name] = (state[name].float() * factor).to(state[name].dtype)
    save_file(state, merged / "model.safetensors", metadata={"format": "pt"})
    return name


@pytest.mark.parametrize(
    ("name", "dtype"),
    daily(itertools.product(MODELS, TYPES), [(n, "float32") for n in MODELS] + [("gpt2", "bfloat16")]),
)
def test_validate_kind_passes_and_names_fault(
    name: str, dtype: str, made: dict[tuple[str, str], tuple[Path, Path]], tmp_path: Path
) -> None:
    base, adapter = made[name, dtype]
    merged = tmp_path / "merged"
    merge(base, [AdapterChoice(adapter)], merged)
    result = judged(base, adapter, merged)
    assert not failed(result)
    by_name = {c.name: c for c in result.checks}
    assert by_name["noise_floor_max_abs"].value > 0
    assert ("token_agreement" in by_name) == (MODELS[name].kind == "seq2seq")
    spoiled = spoil(merged, MODELS[name].victim, 1.05)
    result = judged(base, adapter, merged)
    assert not result.passed
    # The loaded name may have a prefix that the file's lacks, or the other way round.
    (found,) = result.weight_errors
    assert found.endswith(MODELS[name].loaded or spoiled) or spoiled.endswith(found)


@pytest.mark.parametrize("name", daily(MODELS, ("gpt2", "bert", "clip", "whisper")))
def test_validate_kind_without_adapter_fails(
    name: str, made: dict[tuple[str, str], tuple[Path, Path]], tmp_path: Path
) -> None:
    base, adapter = made[name, "float32"]
    merge(base, [], tmp_path / "merged")
    names = {c.name for c in failed(judged(base, adapter, tmp_path / "merged"))}
    assert {"logits_max_abs", "tensor_errors"} <= names
    if MODELS[name].kind == "seq2seq":
        assert "logits_kl_mean" in names
    if name == "t5":  # others happen to generate the same tokens
        assert "token_agreement" in names


@pytest.mark.parametrize("name", MODELS)
def test_kinds_exactly_one_matches(name: str) -> None:
    model = MODELS[name].model(MODELS[name].config())
    assert kinds.choose(model).name == MODELS[name].kind
    assert sum(k.matches(model) for k in kinds.KINDS) == 1


def test_kinds_unknown_model_is_refused() -> None:
    config = transformers.TimeSeriesTransformerConfig(prediction_length=2, d_model=8)
    with pytest.raises(InputError, match="no kind") as caught:
        kinds.choose(transformers.TimeSeriesTransformerModel(config))
    assert all(k.title in str(caught.value) for k in kinds.KINDS)


def test_inputs_without_tokenizer_are_random_and_reported(
    made: dict[tuple[str, str], tuple[Path, Path]], tmp_path: Path
) -> None:
    plain, adapter = made["gpt2", "float32"]
    base = shutil.copytree(plain, tmp_path / "base")
    merge(base, [AdapterChoice(adapter)], tmp_path / "merged")
    first = judged(base, adapter, tmp_path / "merged").checks[0]
    assert "no tokenizer" in first.note
    save_tokenizer(base)
    merge(base, [AdapterChoice(adapter)], tmp_path / "merged", MergeOptions(force=True))
    result = judged(base, adapter, tmp_path / "merged")
    assert result.passed
    assert "no tokenizer" not in result.checks[0].note


def test_prompts_without_tokenizer_are_refused(
    made: dict[tuple[str, str], tuple[Path, Path]], tmp_path: Path
) -> None:
    base, adapter = made["gpt2", "float32"]
    merge(base, [AdapterChoice(adapter)], tmp_path / "merged")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A prompt.\n")
    options = ValidationOptions(prompts=prompts, provider="cpu")
    with pytest.raises(InputError, match="no tokenizer"):
        validate(base, [AdapterChoice(adapter)], tmp_path / "merged", options=options, progress=Silent())


def test_reference_attaches_adapter_to_bare_body(tmp_path: Path) -> None:
    """config.json names the class with a head, the adapter was trained on AutoModel: no layer may stay without."""
    headed, bare = MODELS["bert tokens"], MODELS["bert"]
    base = headed.save(tmp_path / "base", torch.float32)
    adapter = bare.train(base, tmp_path / "adapter")
    merge(base, [AdapterChoice(adapter)], tmp_path / "merged")
    assert not failed(judged(base, adapter, tmp_path / "merged"))
    spoil(tmp_path / "merged", bare.victim, 1.05)
    assert not judged(base, adapter, tmp_path / "merged").passed


def test_reference_adapter_fitting_no_class_is_refused(
    made: dict[tuple[str, str], tuple[Path, Path]], tmp_path: Path
) -> None:
    base, adapter = made["bert", "float32"]
    merge(base, [AdapterChoice(adapter)], tmp_path / "merged")
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    state = load_file(adapter / "adapter_model.safetensors")
    renamed = {k.replace("encoder.layer", "encoder.block"): v for k, v in state.items()}
    save_file(renamed, other / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="PEFT has no place") as caught:
        judged(base, other, tmp_path / "merged")
    assert "encoder" in str(caught.value)


@pytest.mark.parametrize(
    ("a", "b", "edits"), [("", "", 0), ("abc", "abc", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("ab", "ba", 2)]
)
def test_edit_distance_matches_definition(a: str, b: str, edits: int) -> None:
    assert edit_distance([ord(c) for c in a], [ord(c) for c in b]) == edits
