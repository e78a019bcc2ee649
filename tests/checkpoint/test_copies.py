"""A tensor that is copied and hashed: by the kernel and read again, or read once where the kernel cannot help."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from lora_export.checkpoint import open_checkpoint
from lora_export.checkpoint.hashing import TensorHash, hash_tensor
from lora_export.contracts.tensors import STRETCH
from lora_export.storage.workers import OpenFile


@pytest.mark.parametrize("apart", [False, True])
def test_copy_to_with_hash_reads_once_from_another_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: bool
) -> None:
    size = STRETCH + 1000
    save_file({"w": torch.randint(0, 256, (size,), dtype=torch.uint8)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    info = open_checkpoint(tmp_path).tensors["w"]
    out, digest, ranges = OpenFile.create(tmp_path / "out"), TensorHash(size), list[object]()
    kernel = os.copy_file_range

    def copy(*given: int) -> int:
        ranges.append(given)
        return kernel(*given)

    with monkeypatch.context() as patch:
        patch.setattr(os, "copy_file_range", copy)
        if apart:
            patch.setattr(os, "fstat", lambda fd: SimpleNamespace(st_dev=fd))
        info.source.copy_to(info, 0, size, out, 5, digest.add)
    out.close()
    assert (tmp_path / "out").read_bytes()[5:] == info.read_bytes(0, size).numpy().tobytes()
    assert digest.hexdigest() == hash_tensor(info) and bool(ranges) != apart
