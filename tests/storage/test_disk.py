"""Bytes on the disk: when the system is told to send them there."""

import os
from pathlib import Path

import pytest

from lora_export.storage import disk


def test_unsynced_folder_is_synced_neither_within_nor_left_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("a")
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with pytest.raises(RuntimeError), disk.unsynced():
        disk.sync_tree(tmp_path)
        raise RuntimeError
    assert synced == []
    disk.sync_tree(tmp_path)
    assert len(synced) == 2
