"""Disks that are full, read-only or mounted in odd places, and the modes of what is written."""

import contextlib
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import lora_export.merging
from tests.daily import later
from tests.failures.commands import everything, invoke, merge_words
from tests.failures.planted import Scene
from tests.failures.scenes import DAILY, SLOW, stock

__all__ = ["stock"]  # a fixture

PAGE = 4096


def mounted(*words: object) -> bool:
    done = subprocess.run(["mount", *[str(w) for w in words]], capture_output=True, check=False)
    return done.returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    if shutil.which("mount") is None or not mounted("-t", "tmpfs", "-o", "size=64m", "tmpfs", path):
        pytest.skip("mounting a file system takes root")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def resize(disk: Path, option: str) -> None:
    assert mounted("-o", f"remount,{option}", disk)


def pages(folder: Path) -> int:
    return sum(-(-p.stat().st_size // PAGE) for p in folder.rglob("*") if p.is_file())


def words_for(work: Path, disk: Path) -> list[object]:
    return ["merge", "-b", work / "base", "-a", work / "adapter", "-o", disk / "out", "--force"]


@pytest.fixture
def prepared(
    request: pytest.FixtureRequest, work: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, int]:
    """Pages and inodes that a merge takes, where it is not asked beforehand whether there is room."""
    assert invoke(*words_for(work, disk)).exit_code == 0
    monkeypatch.setattr(lora_export.merging, "check_space", lambda folder, needed: None)
    needed = pages(disk / "out"), len(everything(disk / "out"))
    shutil.rmtree(disk / "out")
    return needed


@pytest.mark.parametrize("exists", [False, True])
def test_disk_full_at_any_page_leaves_old_or_new_state(
    work: Path, disk: Path, prepared: tuple[int, int], exists: bool
) -> None:
    old = old_output(disk, exists)
    before, size, full = everything(disk), pages(disk), set()
    for room in range(1, prepared[0] + 8):
        resize(disk, f"size={(size + room) * PAGE}")
        result = invoke(*words_for(work, disk))
        if result.exit_code == 0:
            break
        assert result.exit_code == 1 and "No space left on device" in result.stderr, result.output
        assert "try:" in result.stderr and "internal error" not in result.output, result.output
        assert everything(disk) == before, room
        full |= {p.name for p in (work / "base").glob("*.safetensors") if p.name in result.stderr}
    assert result.exit_code == 0 and room > prepared[0] - old
    assert len(full) == 4  # in each of the shards once


@pytest.mark.parametrize("exists", [False, True])
def test_disk_without_inodes_is_reported(work: Path, disk: Path, prepared: tuple[int, int], exists: bool) -> None:
    old_output(disk, exists)
    before = everything(disk)
    for room in range(1, prepared[1] + 8):
        resize(disk, f"nr_inodes={len(before) + 1 + room}")
        result = invoke(*words_for(work, disk))
        if result.exit_code == 0:
            break
        assert result.exit_code == 1 and "No space left on device" in result.stderr, result.output
        assert everything(disk) == before, room
    assert result.exit_code == 0 and room > 10


def writing(scenes: list[Scene]) -> list[Scene]:
    return [s for s in scenes if s.name.split()[0] not in ("verify", "validate")]


@pytest.mark.parametrize(
    "scene", [*writing(DAILY), *map(later, writing(SLOW))], ids=lambda s: getattr(s, "name", None)
)
def test_disk_full_is_reported_and_nothing_left(
    scene: Scene, stock: Callable[[Scene], Path], disk: Path, tmp_path: Path
) -> None:
    """Every command that writes, with room for a part of what it writes."""
    work = disk / "work"
    shutil.copytree(stock(scene), work)
    before, size, there = everything(disk), pages(disk), {p.lstat().st_ino for p in disk.rglob("*")}
    assert invoke(*scene.words(work)).exit_code == 0
    after = everything(disk)
    written = [p for p in disk.rglob("*") if p.is_file() and p.lstat().st_ino not in there]
    needed = sum(-(-p.stat().st_size // PAGE) for p in written)
    shutil.rmtree(work)
    shutil.copytree(stock(scene), work)
    for share in (0, 0.1, 0.4, 0.8):
        room = int(needed * share)
        resize(disk, f"size={(size + room) * PAGE}")
        result = invoke(*scene.words(work))
        text = f"{share} of {needed} pages: {result.exit_code} {result.output}"
        assert result.exit_code == 1, text
        assert "internal error" not in result.output and "Traceback" not in result.output, text
        words = "needed" if room else "(needed|free)"  # without any, a command may fail before it knows
        assert re.search(rf"\d (bytes|GB) are {words}", result.stderr), text
        assert everything(disk) == before, text
    resize(disk, "size=64m")
    assert invoke(*scene.words(work)).exit_code == 0
    assert set(everything(disk)) == set(after)


def old_output(disk: Path, exists: bool) -> int:
    if exists:
        (disk / "out").mkdir()
        (disk / "out" / "mine.txt").write_text("of the user" * 1000)
    return pages(disk)


def test_disk_too_small_is_refused_before_first_byte(work: Path, disk: Path) -> None:
    resize(disk, "size=40k")
    result = invoke(*words_for(work, disk))
    assert result.exit_code == 1 and "are needed and" in result.stderr and "try:" in result.stderr
    assert everything(disk) == {}


def test_mount_point_as_output_is_refused(work: Path, disk: Path) -> None:
    for force in ([], ["--force"]):
        words = ["merge", "-b", work / "base", "-a", work / "adapter", "-o", disk, *force]
        result = invoke(*words)
        assert result.exit_code == 1 and "mount point" in result.stderr and f"-o {disk}/" in result.stderr
        assert everything(disk) == {}
    assert invoke(*words_for(work, disk)).exit_code == 0


@pytest.mark.parametrize("output", ["alias", "alias/out"])
def test_input_under_other_name_as_output_is_refused(work: Path, disk: Path, output: str) -> None:
    (disk / "alias").mkdir()
    assert mounted("--bind", work / "base", disk / "alias")
    try:
        before = everything(work)
        words = ["merge", "-b", work / "base", "-a", work / "adapter", "-o", disk / output, "--force"]
        result = invoke(*words)
        assert result.exit_code == 1 and "lies inside an input or contains one" in result.stderr, result.output
        assert everything(work) == before
    finally:
        subprocess.run(["umount", str(disk / "alias")], check=True)


@pytest.fixture(params=["by its modes", "by its mount"])
def read_only(request: pytest.FixtureRequest, work: Path) -> Iterator[Path]:
    """The inputs where nothing can be written: for root, only a mount sees to that."""
    if request.param == "by its mount":
        disk: Path = request.getfixturevalue("disk")
        for name in ("base", "adapter"):
            shutil.move(work / name, disk / name)
        resize(disk, "ro")
        yield disk
        return
    paths = [p for name in ("base", "adapter") for p in ((work / name), *(work / name).rglob("*"))]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield work
    for path in paths:
        path.chmod(0o755 if path.is_dir() else 0o644)


def test_read_only_inputs_are_enough(read_only: Path, tmp_path: Path) -> None:
    before = everything(read_only)
    words = ["merge", "-b", read_only / "base", "-a", read_only / "adapter", "-o", tmp_path / "out"]
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    assert everything(read_only) == before


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_output_modes_follow_umask(work: Path, mask: int) -> None:
    for path in work.rglob("*"):
        path.chmod(0o711 if path.is_dir() else 0o755)
    with umask(mask):
        assert invoke(*merge_words(work)).exit_code == 0
    wanted: Callable[[Path], int] = lambda p: (0o777 if p.is_dir() else 0o666) & ~mask  # noqa: E731
    paths = [work / "out", *(work / "out").rglob("*")]
    assert len(paths) > 12
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) == wanted(path), path
