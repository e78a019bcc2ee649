"""The end of a text follows the tokenizer that an adapter brings."""

import json
from pathlib import Path
from typing import Any

import pytest

from lora_export.contracts import AdapterChoice, MergeOptions, VerifyOptions
from lora_export.merging import merge
from lora_export.merging.certificate.verify import verify_folder
from lora_export.onnx_export.engines.companions import follow_ends
from lora_export.progress import Silent
from lora_export.validation.folder.companions import expected_folder
from lora_export.validation.folder.settings import differences
from tests.builders import edit_json, lora, save_adapter, save_base


def tokenizer(folder: Path, end: str, number: int, entry: bool = False) -> None:
    """A tokenizer whose texts end with a token of this id. entry: as transformers 4 wrote it."""
    token: Any = {"content": end, "special": True} if entry else end
    settings = {"tokenizer_class": "TokenizersBackend", "eos_token": token}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    added = [
        {
            "id": number,
            "content": end,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
    ]
    model = {"type": "BPE", "vocab": {f"t{i}": i for i in range(number)}, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": added, "model": model}))


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base = save_base(tmp_path / "base")
    tokenizer(base, "</s>", 2)
    edit_json(base / "config.json", eos_token_id=2)
    (base / "generation_config.json").write_text('{"eos_token_id": [2, 7], "do_sample": true}')
    return base, save_adapter(tmp_path / "adapter", base, lora())


def settings(folder: Path) -> tuple[Any, Any]:
    return tuple(
        json.loads((folder / n).read_text())["eos_token_id"] for n in ("config.json", "generation_config.json")
    )


@pytest.mark.parametrize("entry", [False, True])
def test_merge_follows_end_of_adapters_tokenizer(pair: tuple[Path, Path], tmp_path: Path, entry: bool) -> None:
    base, adapter = pair
    tokenizer(adapter, "<|im_end|>", 9, entry)
    result = merge(base, [AdapterChoice(adapter)], tmp_path / "out")
    assert settings(tmp_path / "out") == (9, [9, 2, 7])
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["do_sample"] is True
    assert [w for w in result.warnings if "'<|im_end|>'" in w and "eos_token_id is 9" in w]
    found = verify_folder(tmp_path / "out", base, [AdapterChoice(adapter)], VerifyOptions(), Silent())
    assert found.verified
    wanted = expected_folder(
        base, [AdapterChoice(adapter)], tmp_path / "out", MergeOptions(), tmp_path / "settings"
    )
    assert list(differences(wanted, tmp_path / "out")) == []
    edit_json(tmp_path / "out" / "generation_config.json", eos_token_id=[2, 7])
    assert [d for d in differences(wanted, tmp_path / "out") if "eos_token_id" in d]


@pytest.mark.parametrize(("end", "number"), [("</s>", 2), ("<|im_end|>", 5000)])
def test_merge_keeps_end_that_model_knows(pair: tuple[Path, Path], tmp_path: Path, end: str, number: int) -> None:
    """The same end again, or one without a row in the model."""
    base, adapter = pair
    tokenizer(adapter, end, number)
    result = merge(base, [AdapterChoice(adapter)], tmp_path / "out")
    assert settings(tmp_path / "out") == (2, [2, 7])
    assert bool([w for w in result.warnings if "not followed" in w]) == (end != "</s>")
    wanted = expected_folder(
        base, [AdapterChoice(adapter)], tmp_path / "out", MergeOptions(), tmp_path / "settings"
    )
    assert list(differences(wanted, tmp_path / "out")) == []


def test_genai_config_follows_folder(tmp_path: Path) -> None:
    """As after a reweighting, which takes genai_config.json from another model's export."""
    (tmp_path / "genai_config.json").write_text('{"model": {"eos_token_id": 2, "type": "llama"}}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 9}')
    tokenizer(tmp_path, "<|im_end|>", 9)
    follow_ends(tmp_path)
    assert json.loads((tmp_path / "genai_config.json").read_text())["model"]["eos_token_id"] == 9
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 2]}')
    follow_ends(tmp_path)
    assert json.loads((tmp_path / "genai_config.json").read_text())["model"]["eos_token_id"] == [9, 4, 2]
