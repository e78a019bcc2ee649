"""Links in models' folders: within the folder and into a hub cache's blobs they are followed, else refused."""

import json
import shutil
from pathlib import Path

import pytest

from lora_export.contracts import AdapterChoice
from lora_export.errors import InputError
from lora_export.merging import merge
from tests.builders import lora, save_adapter, save_base, tensors
from tests.failures.commands import everything

NAMES = ["model.safetensors", "config.json", "generation_config.json", "notes.txt"]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    base = save_base(tmp_path / "base")
    (base / "notes.txt").write_text("notes")
    return base, save_adapter(tmp_path / "adapter", base, lora())


def outside(path: Path) -> Path:
    """The file moved to another folder, and a link to it in its place."""
    elsewhere = path.parents[1] / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    moved = elsewhere / path.name
    shutil.move(path, moved)
    path.symlink_to(moved)
    return moved


@pytest.mark.parametrize("name", NAMES)
def test_a_link_out_of_the_base_is_refused(folders: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    base, adapter = folders
    outside(base / name)
    with pytest.raises(InputError, match="leads out of the folder") as refusal:
        merge(base, [AdapterChoice(adapter)], tmp_path / "out")
    assert refusal.value.where == str(base / name)
    assert {p.name for p in tmp_path.iterdir()} == {"base", "adapter", "elsewhere"}


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_link_out_of_the_adapter_is_refused(folders: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    base, adapter = folders
    outside(adapter / name)
    with pytest.raises(InputError, match="leads out of the folder"):
        merge(base, [AdapterChoice(adapter)], tmp_path / "out")


def test_a_hub_cache_links_to_its_own_blobs(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = folders
    merge(base, [AdapterChoice(adapter)], tmp_path / "expected")
    repository = tmp_path / "models--owner--name"
    snapshot, blobs = repository / "snapshots" / ("a" * 40), repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(sorted(base.iterdir())):
        shutil.move(path, blobs / str(i))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(i))
    merge(snapshot, [AdapterChoice(adapter)], tmp_path / "out")
    names = {"model.safetensors", "config.json", "generation_config.json", "notes.txt"}
    found, expected = everything(tmp_path / "out"), everything(tmp_path / "expected")
    assert {n: found[n] for n in names} == {n: expected[n] for n in names}
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())
    other = tmp_path / "models--other--name" / "blobs"
    other.mkdir(parents=True)
    shutil.move(blobs / "0", other / "0")
    first = sorted(snapshot.iterdir())[0]
    first.unlink()
    first.symlink_to(other / "0")
    with pytest.raises(InputError, match="leads out of the folder"):
        merge(snapshot, [AdapterChoice(adapter)], tmp_path / "again")


def test_links_within_the_folder_and_to_the_folder_are_followed(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = folders
    (base / "real.json").write_text(json.dumps({"x": 1}))
    (base / "link.json").symlink_to("real.json")
    (tmp_path / "there").symlink_to(base)
    merge(tmp_path / "there", [AdapterChoice(adapter)], tmp_path / "out")
    assert (tmp_path / "out" / "link.json").read_text() == '{"x": 1}' and not (
        tmp_path / "out" / "link.json"
    ).is_symlink()
    assert tensors(tmp_path / "out").keys() == tensors(base).keys()
