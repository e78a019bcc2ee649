"""Signs of whether the base is the one that the adapter was trained on."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from lora_export.contracts import AdapterChoice, MergeResult
from lora_export.merging import CERTIFICATE, merge
from tests.builders import edit_json, edit_tensors, load, lora, randomize, save_base, tensors


def trained(folder: Path, base: Path, config: Any, rows: int | None = None) -> Path:
    """An adapter after a short training: its own matrices moved, and a few rows of an embedding that it saves."""
    model = peft.get_peft_model(load(base, rows=rows), config)
    randomize(model, 3, ("lora_B",), 0.01)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.default" in name and "embed_tokens" in name:
                parameter[5:40] += 0.1
    model.save_pretrained(folder, save_embedding_layers=bool(rows))
    return folder


def outcome(base: Path, adapter: Path, out: Path) -> tuple[dict[str, str], MergeResult]:
    result = merge(base, [AdapterChoice(adapter)], out)
    return {c.name: c.outcome for c in result.base_checks}, result


@pytest.fixture
def bases(tmp_path: Path) -> tuple[Path, Path]:
    """Two bases of one shape; the norms of the other one's rows are twice as large."""
    base, other = save_base(tmp_path / "base"), save_base(tmp_path / "other", seed=9)
    edit_tensors(other / "model.safetensors", {n: 2 * v for n, v in tensors(other).items()})
    return base, other


@pytest.mark.parametrize(
    ("config", "sign", "rows"),
    [
        (lora(use_dora=True), "magnitudes", None),
        (peft.DeloraConfig(r=3, target_modules=["q_proj", "down_proj"]), "norms", None),
        (lora(modules_to_save=["embed_tokens"]), "rows", None),
        (lora(), "rows", 107),
    ],
    ids=["dora", "delora", "embedding saved", "embedding resized"],
)
def test_base_check_values_detect_other_base(
    tmp_path: Path, bases: tuple[Path, Path], config: Any, sign: str, rows: int | None
) -> None:
    base, other = bases
    adapter = trained(tmp_path / "adapter", base, config, rows)
    found, result = outcome(base, adapter, tmp_path / "right")
    assert found[sign] == "agrees" and found["shapes"] == "agrees"
    assert not [w for w in result.warnings if "right base" in w]
    found, result = outcome(other, adapter, tmp_path / "wrong")
    assert found[sign] == "differs"
    assert [w for w in result.warnings if "is this the right base?" in w]
    certificate = json.loads((tmp_path / "wrong" / CERTIFICATE).read_text())
    assert {c["name"]: c["outcome"] for c in certificate["base_checks"]} == found


def test_base_check_plain_adapter_is_unknown(tmp_path: Path, bases: tuple[Path, Path]) -> None:
    adapter = trained(tmp_path / "adapter", bases[0], lora())
    for base in bases:
        found, result = outcome(base, adapter, tmp_path / f"out-{base.name}")
        assert found["values"] == "unknown" and not result.warnings
    assert found["name"] == "unknown"  # a folder may be called anything


@pytest.mark.parametrize(
    ("wanted", "recorded", "expected"),
    [
        ("owner/model", "owner/model", "agrees"),
        ("/home/somebody/Model", "owner/model", "agrees"),
        ("owner/other", "owner/model", "differs"),
        ("/home/somebody/other", "owner/model", "unknown"),
        ("owner/base", None, "agrees"),
        ("owner/other", None, "unknown"),
        (None, "owner/model", "unknown"),
    ],
)
def test_base_check_compares_names(
    tmp_path: Path, bases: tuple[Path, Path], wanted: str, recorded: str, expected: str
) -> None:
    base, adapter = bases[0], trained(tmp_path / "adapter", bases[0], lora())
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=wanted)
    edit_json(base / "config.json", _name_or_path=recorded)
    assert outcome(base, adapter, tmp_path / "out")[0]["name"] == expected


def test_base_check_reads_hub_name_and_revision(tmp_path: Path, bases: tuple[Path, Path]) -> None:
    adapter = trained(tmp_path / "adapter", bases[0], lora())
    snapshot = tmp_path / "models--owner--model" / "snapshots" / ("a" * 40)
    shutil.copytree(bases[0], snapshot)
    for revision, expected in (("a" * 40, "agrees"), ("b" * 40, "differs")):
        edit_json(adapter / "adapter_config.json", base_model_name_or_path="owner/model", revision=revision)
        found, _ = outcome(snapshot, adapter, tmp_path / f"out-{expected}")
        assert found["name"] == "agrees" and found["revision"] == expected


def test_base_check_compares_class(tmp_path: Path, bases: tuple[Path, Path]) -> None:
    adapter = trained(tmp_path / "adapter", bases[0], lora())
    edit_json(adapter / "adapter_config.json", auto_mapping={"base_model_class": "LlamaForCausalLM"})
    assert outcome(bases[0], adapter, tmp_path / "out")[0]["architecture"] == "agrees"
