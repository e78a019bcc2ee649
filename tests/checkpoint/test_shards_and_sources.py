"""Output shards planned before a byte, companion files, and names of sources."""

import json
from pathlib import Path

import pytest

from lora_export.checkpoint.companions import companion_files, tokenizer_files, write_config
from lora_export.checkpoint.shards import OutputTensor, plan_shards, write_index
from lora_export.checkpoint.sources import resolve
from lora_export.errors import InputError


def tensor(name: str, size: int, home: str = "model.safetensors") -> OutputTensor:
    return OutputTensor(name, "U8", (size,), home)


def test_shards_of_base_are_kept() -> None:
    homes = ["one", "one", "two", "one", "three"]
    shards = plan_shards([tensor(str(i), 5, home) for i, home in enumerate(homes)], None, {})
    assert [[t.name for t in s.tensors] for s in shards] == [["0", "1", "3"], ["2"], ["4"]]
    assert [s.file for s in shards] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def test_shards_by_size_keep_order_and_limit() -> None:
    shards = plan_shards([tensor(str(n), n) for n in (4, 6, 1, 30, 9, 2)], 10, {"by": "us"})
    assert [[t.nbytes for t in s.tensors] for s in shards] == [[4, 6], [1], [30], [9], [2]]
    header = json.loads(shards[0].header[8:])
    assert header["__metadata__"] == {"format": "pt", "by": "us"}
    assert len(shards[0].header) % 8 == 0


def test_index_exists_only_with_several_shards(tmp_path: Path) -> None:
    write_index(tmp_path, plan_shards([tensor("a", 3)], None, {}))
    assert not list(tmp_path.iterdir())
    write_index(tmp_path, plan_shards([tensor("b", 3), tensor("a", 4)], 4, {}))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 7}
    assert list(index["weight_map"].items()) == [
        ("a", "model-00002-of-00002.safetensors"),
        ("b", "model-00001-of-00002.safetensors"),
    ]


def test_config_changes_only_required_keys(tmp_path: Path) -> None:
    text = '{"z": 1,  "a": {"é": [1, 2]}, "drop": true}\n'
    config = json.loads(text)
    (tmp_path / "in").write_text(text, encoding="utf-8")
    write_config(tmp_path / "in", tmp_path / "out", config, {}, frozenset({"absent"}))
    assert (tmp_path / "out").read_text(encoding="utf-8") == text
    write_config(tmp_path / "in", tmp_path / "out", config, {"z": 2}, frozenset({"drop"}))
    assert list(json.loads((tmp_path / "out").read_text()).items()) == [("z", 2), ("a", {"é": [1, 2]})]


def test_incomplete_tokenizer_files_are_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "special_tokens_map.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("x")
    assert [p.name for p in tokenizer_files(tmp_path)] == ["chat_template.jinja"]
    (tmp_path / "tokenizer.json").write_text("{}")
    assert len(tokenizer_files(tmp_path)) == 3
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "weights.gguf").write_text("{}")
    assert [p.name for p in companion_files(tmp_path)] == [
        "chat_template.jinja", "special_tokens_map.json", "tokenizer.json",
    ]  # fmt: skip


def test_resolve_folder_is_itself(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)).folder == tmp_path


@pytest.mark.parametrize("name", ["../x/y", "a/b/c", "a b/c", "-x/y", "/no/such/folder", "owner/name@"])
def test_resolve_invalid_hub_id_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="not a valid Hub ID"):
        resolve(name)


def test_resolve_hub_id_pins_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    commit = "0123456789abcdef0123456789abcdef01234567"
    asked: list[tuple[str, str | None]] = []

    def download(repo: str, revision: str | None = None, allow_patterns: list[str] | None = None) -> str:
        asked.append((repo, revision))
        assert allow_patterns and not any(p.endswith((".py", ".bin")) for p in allow_patterns)
        return str(tmp_path / commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = resolve("owner/name@refs/pr/3")
    assert asked == [("owner/name", "refs/pr/3")]
    assert source.commit == commit and source.folder == tmp_path / commit
