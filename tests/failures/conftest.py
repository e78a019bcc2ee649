"""A base in several shards with an adapter: made once, copied for each test."""

import json
import shutil
from pathlib import Path

import pytest

from tests.builders import lora, save_adapter, save_base


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    base = save_base(folder / "base", max_shard_size=60_000)
    adapter = save_adapter(folder / "adapter", base, lora())
    (base / "tokenizer.json").write_text('{"of": "the base"}')
    (base / "notes.txt").write_text("a companion\n" * 1000)
    (base / "modules.json").write_text("[]")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "mean"}))
    (adapter / "tokenizer.json").write_text('{"of": "the adapter"}')
    return folder


@pytest.fixture
def work(originals: Path, tmp_path: Path) -> Path:
    """A folder with base/ and adapter/ of its own."""
    shutil.copytree(originals, tmp_path / "work")
    return tmp_path / "work"
