"""Another source of tensors is one class: a base that lies in a zip archive is merged like one in a folder."""

import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from lora_export import merging
from lora_export.checkpoint import Checkpoint, open_checkpoint
from lora_export.contracts import AdapterChoice, TensorInfo, TensorSource
from lora_export.errors import CheckpointError
from lora_export.merging import CERTIFICATE, merge
from tests.builders import lora, save_adapter, save_base


class Zipped(TensorSource):
    """Tensors of a zip archive, a member for each tensor. No file can be opened in their place."""

    def __init__(self, archive: Path, like: Checkpoint) -> None:
        self.archive = archive
        self.tensors = {
            t.name: TensorInfo(t.name, t.dtype, t.shape, Path("nowhere", t.file.name), t.start, t.end, self)
            for t in like.tensors.values()
        }

    def read_into(self, info: TensorInfo, start: int, into: memoryview) -> None:
        with zipfile.ZipFile(self.archive) as archive, archive.open(info.name) as member:
            member.seek(start)
            if member.readinto(into) < len(into):  # type: ignore[attr-defined]
                raise CheckpointError("the member ended early", where=self.archive, tensor=info.name)


@pytest.fixture
def zipped(tmp_path: Path) -> tuple[Path, Checkpoint]:
    """A base as a folder, and as an archive beside the base's small files."""
    folder = save_base(tmp_path / "base", dtype=torch.bfloat16, max_shard_size="12KB")
    checkpoint = open_checkpoint(folder)
    with zipfile.ZipFile(tmp_path / "base.zip", "w") as archive:
        for info in checkpoint.tensors.values():
            archive.writestr(info.name, info.read_bytes(0, info.nbytes).numpy().tobytes())
    small = shutil.copytree(folder, tmp_path / "small", ignore=shutil.ignore_patterns("*.safetensors*"))
    source = Zipped(tmp_path / "base.zip", checkpoint)
    return folder, Checkpoint(source.tensors, Path(small), checkpoint.config, checkpoint.metadata)


def test_merge_base_in_archive_equals_merge_of_folder(zipped: tuple[Path, Checkpoint], tmp_path: Path) -> None:
    adapter = [AdapterChoice(save_adapter(tmp_path / "adapter", zipped[0], lora()))]
    expected, made = merge(zipped[0], adapter, tmp_path / "expected"), merge(zipped[1], adapter, tmp_path / "out")
    assert made.records == expected.records
    names = {p.name for p in (tmp_path / "expected").iterdir()}
    assert names == {p.name for p in (tmp_path / "out").iterdir()} and CERTIFICATE in names
    for name in names - {CERTIFICATE}:  # which has the sizes of the base's files
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes(), name


def test_merge_source_ending_early_leaves_nothing(zipped: tuple[Path, Checkpoint], tmp_path: Path) -> None:
    adapter = [AdapterChoice(save_adapter(tmp_path / "adapter", zipped[0], lora()))]
    name = "model.norm.weight"
    source = zipped[1].tensors[name].source
    shutil.move(tmp_path / "base.zip", tmp_path / "whole.zip")
    with zipfile.ZipFile(tmp_path / "whole.zip") as whole, zipfile.ZipFile(tmp_path / "base.zip", "w") as cut:
        for member in whole.namelist():
            cut.writestr(member, whole.read(member)[: -2 if member == name else None])
    assert isinstance(source, Zipped)
    with pytest.raises(CheckpointError, match="the member ended early") as raised:
        merge(zipped[1], adapter, tmp_path / "out")
    assert raised.value.tensor == name and not (tmp_path / "out").exists()


def test_merging_opens_no_tensor_file_itself() -> None:
    package = Path(merging.__file__).parent
    opening = re.compile(r"os\.open|os\.pread|\.file\.open|\.stat\(")
    assert not [p for p in package.rglob("*.py") if opening.search(p.read_text(encoding="utf-8"))]
