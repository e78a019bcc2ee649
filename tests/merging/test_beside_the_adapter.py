"""What lies beside an adapter, or beside its base: carried into the output, left out, refused, or named."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from lora_export.contracts import AdapterChoice, MergeOptions, Source, ValidationOptions, VerifyOptions
from lora_export.errors import LoraExportError
from lora_export.merging import merge
from lora_export.merging.certificate.verify import verify_folder
from lora_export.progress import Silent
from lora_export.validation.folder.companions import expected_folder
from lora_export.validation.folder.settings import differences
from lora_export.validation.reference.files import headers
from lora_export.workflows.validating import validate_folder
from tests.builders import bert_config, edit_json, lora, save_adapter, save_base, tensors

STATE = (
    "trainer_state.json",
    "all_results.json",
    "trainer_log.jsonl",
    "latest",
    "training_args.bin",
    "scheduler.pt",
)
TRAINED_ON = "training quantization"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base = save_base(tmp_path / "base")
    return base, save_adapter(tmp_path / "adapter", base, lora())


@pytest.fixture
def folder(tmp_path: Path, pair: tuple[Path, Path]) -> Path:
    """Base and adapter in one folder, with what a trainer leaves there."""
    for path in pair[1].iterdir():
        shutil.copy(path, pair[0])
    for name in STATE:
        (pair[0] / name).write_text("{}")
    return pair[0]


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def verify(merged: Path, base: Path, adapters: list[AdapterChoice]) -> Any:
    return verify_folder(merged, base, adapters, VerifyOptions(), Silent())


def settings_differ(base: Path, adapter: Path, merged: Path, scratch: Path) -> list[str]:
    expected = expected_folder(base, [AdapterChoice(adapter)], merged, MergeOptions(), scratch)
    return list(differences(expected, merged))


def test_merge_base_and_adapter_in_one_folder_works(tmp_path: Path, folder: Path, pair: tuple[Path, Path]) -> None:
    merge(folder, [AdapterChoice(folder)], tmp_path / "out")
    assert not [n for n in files(tmp_path / "out") if n.startswith("adapter") or n in STATE]
    assert verify(tmp_path / "out", folder, [AdapterChoice(folder)]).verified
    assert settings_differ(folder, folder, tmp_path / "out", tmp_path / "settings") == []
    apart = save_base(tmp_path / "apart")
    merge(apart, [AdapterChoice(pair[1])], tmp_path / "of two folders")
    same = tensors(tmp_path / "of two folders")
    assert all(torch.equal(value, same[name]) for name, value in tensors(tmp_path / "out").items())


@pytest.mark.slow
def test_validate_one_folder_loads_base_without_adapter(tmp_path: Path, folder: Path) -> None:
    merge(folder, [AdapterChoice(folder)], tmp_path / "out")
    source = Source(str(folder), folder)
    found = validate_folder(source, [(source, 1.0)], tmp_path / "out", (), (), ValidationOptions(), Silent())
    assert found.passed


def test_merge_copies_value_head_and_reports_it(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    save_file({"v_head.summary.weight": torch.randn(1, 48)}, adapter / "value_head.safetensors")
    result = merge(base, [AdapterChoice(adapter)], tmp_path / "out")
    head = tmp_path / "out" / "value_head.safetensors"
    assert head.read_bytes() == (adapter / head.name).read_bytes()
    assert [w for w in result.warnings if "LLaMA-Factory" in w]
    certificate = json.loads((tmp_path / "out" / "lora_export_certificate.json").read_text())
    assert head.name in certificate["files"]
    assert "v_head.summary.weight" not in headers(tmp_path / "out")  # it is no tensor of the model
    assert settings_differ(base, adapter, tmp_path / "out", tmp_path / "settings") == []
    head.write_bytes(head.read_bytes()[:-1] + b"\x01")
    assert not verify(tmp_path / "out", base, [AdapterChoice(adapter)]).verified
    (found,) = settings_differ(base, adapter, tmp_path / "out", tmp_path / "again")
    assert found == "value_head.safetensors: different contents"


def sentence_modules(adapter: Path) -> None:
    """As sentence-transformers saves a model whose transformer has an adapter."""
    types = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "3_Normalize": "Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (path, name) in enumerate(types.items())
    ]
    (adapter / "modules.json").write_text(json.dumps(modules))
    for name in ("1_Pooling", "2_Dense"):
        (adapter / name).mkdir()
        (adapter / name / "config.json").write_text(json.dumps({"in_features": 48}))
    save_file({"linear.weight": torch.randn(8, 48)}, adapter / "2_Dense" / "model.safetensors")
    (adapter / "sentence_bert_config.json").write_text('{"max_seq_length": 32}')
    (adapter / "config_sentence_transformers.json").write_text('{"prompts": {"query": "q: "}}')


def test_merge_takes_sentence_transformers_modules_from_adapter(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", transformers.BertModel, bert_config())
    adapter = save_adapter(
        tmp_path / "adapter", base, lora(target_modules=["query", "dense"]), transformers.BertModel
    )
    sentence_modules(adapter)
    (base / "sentence_bert_config.json").write_text('{"max_seq_length": 512}')
    result = merge(base, [AdapterChoice(adapter)], tmp_path / "out")
    carried = {
        "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json",
        "2_Dense/config.json", "2_Dense/model.safetensors",
    }  # fmt: skip
    for name in carried:
        assert (tmp_path / "out" / name).read_bytes() == (adapter / name).read_bytes(), name
    assert [w for w in result.warnings if "2_Dense/model.safetensors" in w]
    assert verify(tmp_path / "out", base, [AdapterChoice(adapter)]).verified
    assert settings_differ(base, adapter, tmp_path / "out", tmp_path / "settings") == []
    (tmp_path / "out" / "2_Dense" / "model.safetensors").unlink()
    assert settings_differ(base, adapter, tmp_path / "out", tmp_path / "again") == [
        "2_Dense/model.safetensors: missing"
    ]


@pytest.mark.parametrize("owner", ["base", "adapter"])
def test_merge_omits_pickled_modules_and_reports_it(tmp_path: Path, pair: tuple[Path, Path], owner: str) -> None:
    source = pair[0] if owner == "base" else pair[1]
    sentence_modules(source)
    (source / "2_Dense" / "model.safetensors").rename(source / "2_Dense" / "pytorch_model.bin")
    result = merge(pair[0], [AdapterChoice(pair[1])], tmp_path / "out")
    assert [w for w in result.warnings if "2_Dense/pytorch_model.bin not copied" in w]
    assert "2_Dense/pytorch_model.bin" not in files(tmp_path / "out")


def test_merge_names_other_weights_beside_adapter(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    for name in (
        "projector.safetensors",
        "pytorch_model.bin",
        "training_args.bin",
        "optimizer.pt",
        "rng_state.pth",
    ):
        (adapter / name).write_bytes(b"")
    (told,) = [
        w for w in merge(base, [AdapterChoice(adapter)], tmp_path / "out").warnings if "nothing was merged" in w
    ]
    assert "projector.safetensors, pytorch_model.bin, beside" in told


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("value_head.bin", "a reward model's value head, pickled"),
        ("classifier.pt", "a trained head apart"),
        ("score.safetensors", "a trained head apart"),
        ("non_lora_trainables.bin", "LLaVA trained the whole projector"),
    ],
)
def test_merge_refuses_to_lose_trained_heads(tmp_path: Path, pair: tuple[Path, Path], name: str, told: str) -> None:
    (pair[1] / name).write_bytes(b"")
    with pytest.raises(LoraExportError, match=told) as refusal:
        merge(pair[0], [AdapterChoice(pair[1])], tmp_path / "out")
    assert refusal.value.next_step and not (tmp_path / "out").exists()


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize(
    ("name", "told"),
    [("lora.safetensors", "mistral-finetune's"), ("adapter_0.pt", "torchtune's"), ("lora-f16.gguf", "llama.cpp's")],
)
def test_merge_names_other_adapter_formats(
    tmp_path: Path, pair: tuple[Path, Path], name: str, told: str, with_config: bool
) -> None:
    base, adapter = pair
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / name).write_bytes(b"")
    if not with_config:
        (adapter / "adapter_config.json").unlink()
    with pytest.raises(LoraExportError, match=f"this is {told}") as refusal:
        merge(base, [AdapterChoice(adapter)], tmp_path / "out")
    assert refusal.value.next_step


CARD = "- load_in_4bit: True\n- bnb_4bit_quant_type: {}\n- bnb_4bit_use_double_quant: {}\n"


@pytest.mark.parametrize(
    ("named", "card", "flags"),
    [
        ("unsloth/base-bnb-4bit", "", "nf4 --training-double-quant, or by unsloth/base-bnb-4bit"),
        ("unsloth/base-unsloth-bnb-4bit", "", "itself as -b, some of whose layers stay in 16 bits"),
        ("owner/base-bnb-8bit", "", "--training-quantization int8"),
        ("owner/base-AWQ", "", "by owner/base-AWQ itself as -b"),
        ("owner/base", CARD.format("nf4", "False"), "says load_in_4bit.*--training-quantization nf4$"),
        ("owner/base", CARD.format("fp4", "True"), "--training-quantization fp4 --training-double-quant$"),
        ("owner/base", "load_in_8bit: true", "--training-quantization int8$"),
        ("owner/base", "load_in_4bit: False", None),
        ("owner/base-4b", "", None),
    ],
)  # fmt: skip
def test_merge_warns_of_4bit_training(
    tmp_path: Path, pair: tuple[Path, Path], named: str, card: str, flags: str | None
) -> None:
    base, adapter = pair
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=named)
    (adapter / "README.md").write_text(card)
    found = _check(base, adapter, tmp_path / "out", MergeOptions())
    assert (found is None) is (flags is None)
    if flags is not None:
        assert re.search(flags, found)


def test_merge_with_training_quantization_does_not_warn(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="unsloth/base-bnb-4bit")
    assert _check(base, adapter, tmp_path / "out", MergeOptions(training_quantization="nf4")) is None
    (adapter / "README.md").unlink()  # a copy without its card is the same adapter
    assert verify(tmp_path / "out", base, [AdapterChoice(adapter)]).verified


def _check(base: Path, adapter: Path, out: Path, options: MergeOptions) -> Any:
    result = merge(base, [AdapterChoice(adapter)], out, options)
    notes = {c.name: c.note for c in result.base_checks}
    assert [c.outcome for c in result.base_checks if c.name == "name"] != ["differs"]
    assert any(notes[TRAINED_ON] in w for w in result.warnings) if TRAINED_ON in notes else True
    return notes.get(TRAINED_ON)
