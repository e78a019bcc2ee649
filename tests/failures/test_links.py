"""Links in models' folders: within the folder and into a hub cache's blobs they are followed, else refused."""

import json
import os
import shutil
from pathlib import Path

import pytest

from lora_export.contracts import AdapterChoice
from lora_export.errors import ExportError, InputError, LoraExportError, OutputError
from lora_export.merging import merge
from lora_export.onnx_export.weights.reuse import copy_graphs
from lora_export.report import render
from lora_export.storage import sealed
from tests.builders import lora, save_adapter, save_base, tensors
from tests.failures.commands import everything, invoke
from tests.failures.scenes import without_plots
from tests.report.conftest import write

SECONDS = 20
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
def test_link_out_of_base_is_refused(folders: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    base, adapter = folders
    outside(base / name)
    with pytest.raises(InputError, match="leads out of the folder") as refusal:
        merge(base, [AdapterChoice(adapter)], tmp_path / "out")
    assert refusal.value.where == str(base / name)
    assert {p.name for p in tmp_path.iterdir()} == {"base", "adapter", "elsewhere"}


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_link_out_of_adapter_is_refused(folders: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    base, adapter = folders
    outside(adapter / name)
    with pytest.raises(InputError, match="leads out of the folder"):
        merge(base, [AdapterChoice(adapter)], tmp_path / "out")


def test_link_of_hub_cache_to_blobs_is_followed(folders: tuple[Path, Path], tmp_path: Path) -> None:
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


def test_link_within_folder_is_followed(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = folders
    (base / "real.json").write_text(json.dumps({"x": 1}))
    (base / "link.json").symlink_to("real.json")
    (tmp_path / "there").symlink_to(base)
    merge(tmp_path / "there", [AdapterChoice(adapter)], tmp_path / "out")
    assert (tmp_path / "out" / "link.json").read_text() == '{"x": 1}' and not (
        tmp_path / "out" / "link.json"
    ).is_symlink()
    assert tensors(tmp_path / "out").keys() == tensors(base).keys()


def pooling(base: Path) -> Path:
    (base / "modules.json").write_text("[]")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
    return base / "1_Pooling"


@pytest.mark.parametrize("what", ["folder", "file"])
def test_link_as_subfolder_is_refused(folders: tuple[Path, Path], tmp_path: Path, what: str) -> None:
    base, adapter = folders
    path = pooling(base) if what == "folder" else pooling(base) / "config.json"
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="leads out of the folder"):
        merge(base, [AdapterChoice(adapter)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_link_of_hub_cache_subfolder_is_followed(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = folders
    pooling(base)
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / ("a" * 40), tmp_path / "models--a--b" / "blobs"
    shutil.move(base, snapshot)
    blobs.mkdir()
    shutil.move(snapshot / "1_Pooling" / "config.json", blobs / "0")
    (snapshot / "1_Pooling" / "config.json").symlink_to(Path("../../../blobs/0"))
    merge(snapshot, [AdapterChoice(adapter)], tmp_path / "out")
    copied = tmp_path / "out" / "1_Pooling" / "config.json"
    assert copied.read_text() == '{"pooling_mode": "mean"}' and not copied.is_symlink()


def test_link_in_merged_folder_is_reported(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = folders
    pooling(base)
    merge(base, [AdapterChoice(adapter)], tmp_path / "work" / "out")
    assert invoke("verify", tmp_path / "work" / "out").exit_code == 0
    outside(tmp_path / "work" / "out" / "1_Pooling")
    said = invoke("verify", tmp_path / "work" / "out")
    assert (
        said.exit_code == 1 and "a link that leads out of the folder" in said.output and "1_Pooling" in said.output
    )


def test_link_among_adapter_files_is_not_hashed(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = folders
    (tmp_path / "secret").write_text("of somebody")
    (adapter / "adapter_notes").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="leads out of the folder") as refusal:
        merge(base, [AdapterChoice(adapter)], tmp_path / "out")
    assert refusal.value.where == str(adapter / "adapter_notes")


@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("name", ["base/config.json", "base/model.safetensors", "adapter/adapter_config.json"])
def test_fifo_is_refused_without_waiting(folders: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    base, adapter = folders
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(LoraExportError):
        merge(base, [AdapterChoice(adapter)], tmp_path / "out")


def test_file_replaced_by_link_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between finding out where a file lies and opening it, somebody puts a link, or a link to a folder, there."""
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    for folder in ("in/sub", "out"):
        (tmp_path / folder / "file").write_text(folder)
    path, real = tmp_path / "in" / "sub" / "file", Path.resolve

    def swapped(link: Path, target: Path) -> None:
        found = real(path)
        monkeypatch.setattr(Path, "resolve", lambda p, *a: found if p == path else real(p, *a))
        shutil.move(link, link.with_name("before"))
        link.symlink_to(target)

    swapped(path, tmp_path / "out" / "file")
    with pytest.raises(InputError, match="leads out"):
        sealed.sha256(path, tmp_path / "in")
    path.unlink()
    swapped(path.parent, tmp_path / "out")
    with pytest.raises(InputError, match="leads out"):
        sealed.sha256(path, tmp_path / "in")


def test_link_as_report_page_is_not_written(tmp_path: Path) -> None:
    write(without_plots(), tmp_path / "report")
    (tmp_path / "mine").write_text("of the user")
    (tmp_path / "report" / "report.md").unlink()
    (tmp_path / "report" / "report.md").symlink_to(tmp_path / "mine")
    (tmp_path / "report" / ".report.html.partial").symlink_to(tmp_path / "mine")
    html = (tmp_path / "report" / "report.html").read_bytes()
    with pytest.raises(OutputError, match="a folder or a link"):
        render(tmp_path / "report")
    (tmp_path / "report" / "report.md").unlink()
    render(tmp_path / "report")
    assert (tmp_path / "mine").read_text() == "of the user"
    assert (tmp_path / "report" / "report.html").read_bytes() == html


def test_export_naming_files_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of somebody")
    (tmp_path / "export").mkdir()
    with pytest.raises(ExportError, match=r"names the file '\.\./secret'"):
        copy_graphs(tmp_path / "export", tmp_path / "export", ["../secret"])


@pytest.mark.timeout(SECONDS * 3)
def test_validate_fifo_does_not_wait(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = folders
    (tmp_path / "merged").mkdir()
    os.mkfifo(tmp_path / "merged" / "model.safetensors")
    said = invoke("validate", "-b", base, "-a", adapter, "-m", tmp_path / "merged")
    assert said.exit_code == 1 and "not a regular file" in said.output
