"""storage/files.py: output folders that appear whole or not at all."""

import contextlib
import ctypes
import errno
import fcntl
import multiprocessing
import os
import shutil
import signal
import socket
import stat
import time
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from lora_export.errors import GateFailed, InputError, OutputError
from lora_export.storage import disk, locks, scratch, sealed
from lora_export.storage.disk import copy_range, write_at
from lora_export.storage.files import failed_folder, output_folder
from lora_export.storage.sealed import hash_folder, plain_name, read_json


def fill(folder: Path, text: str = "new") -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "file").write_text(text)


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_output_success_leaves_only_output(tmp_path: Path) -> None:
    with output_folder(tmp_path / "deep" / "out", False) as stage:
        assert names(tmp_path / "deep") == {stage.name, ".out.lock"}
        assert stage.name.startswith(".out.partial-")
        fill(stage)
        assert not (tmp_path / "deep" / "out").exists()
    assert names(tmp_path / "deep") == {"out"}
    assert (tmp_path / "deep" / "out" / "sub" / "file").read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, OSError])
def test_output_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), output_folder(tmp_path / "out", False) as stage:
        fill(stage)
        raise error
    assert names(tmp_path) == set()


def test_output_failure_keeps_old_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", "old")
    with pytest.raises(RuntimeError), output_folder(tmp_path / "out", True) as stage:
        fill(stage)
        raise RuntimeError
    assert names(tmp_path) == {"out"}
    assert (tmp_path / "out" / "sub" / "file").read_text() == "old"


def test_output_failed_gate_is_kept_aside_with_reason(tmp_path: Path) -> None:
    for attempt in ("first", "second"):
        with pytest.raises(GateFailed), output_folder(tmp_path / "out", False) as stage:
            fill(stage, attempt)
            raise GateFailed("logits differ by 3", expected="at most 1")
        assert names(tmp_path) == {"out.failed"}
        kept = failed_folder(tmp_path / "out")
        assert (kept / "sub" / "file").read_text() == attempt
        assert "logits differ by 3" in (kept / "FAILED").read_text()
        assert "at most 1" in (kept / "FAILED").read_text()


def test_output_force_replaces_whole_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale").write_text("old")
    with output_folder(tmp_path / "out", True) as stage:
        fill(stage)
        assert names(tmp_path / "out") == {"stale"}
    assert names(tmp_path / "out") == {"sub"}
    assert names(tmp_path) == {"out"}


def test_output_force_without_atomic_exchange_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "exchange_names", lambda a, b: False)
    test_output_force_replaces_whole_folder(tmp_path)


def test_output_existing_needs_force(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("old")
    with (
        pytest.raises(OutputError, match="exists and is not empty") as caught,
        output_folder(tmp_path / "out", False),
    ):
        raise AssertionError("entered")
    assert "--force" in str(caught.value.next_step)
    assert names(tmp_path) == {"out"}


def test_output_empty_needs_no_force(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with output_folder(tmp_path / "out", False) as stage:
        fill(stage)
    assert names(tmp_path / "out") == {"sub"}


@pytest.mark.parametrize("force", [False, True])
def test_output_as_file_or_link_is_refused(tmp_path: Path, force: bool) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for name in ("file", "link"):
        with pytest.raises(OutputError, match="file or a link"), output_folder(tmp_path / name, force):
            raise AssertionError("entered")
    assert names(tmp_path) == {"file", "target", "link"}


@pytest.mark.parametrize("output", ["in", "in/out", ".", "link/out", "in/../in"])
def test_output_overlapping_input_is_refused(tmp_path: Path, output: str) -> None:
    (tmp_path / "work" / "in").mkdir(parents=True)
    (tmp_path / "work" / "link").symlink_to(tmp_path / "work" / "in")
    source, target = tmp_path / "work" / "in", tmp_path / "work" / output
    with (
        pytest.raises(OutputError, match="lies inside an input"),
        output_folder(target, True, inputs=[source]),
    ):
        raise AssertionError("entered")
    assert names(tmp_path / "work") == {"in", "link"}


def test_output_with_similar_name_is_no_overlap(tmp_path: Path) -> None:
    (tmp_path / "out-base").mkdir()
    with output_folder(tmp_path / "out", False, inputs=[tmp_path / "out-base"]) as stage:
        fill(stage)


TOKEN = "0123456789abcdef" * 2


def test_leftovers_of_killed_run_are_removed(tmp_path: Path) -> None:
    (tmp_path / f".out.partial-{TOKEN}").mkdir()
    (tmp_path / f".out.partial-{TOKEN}" / "half").write_text("x")
    (tmp_path / ".out.lock").write_text("99999")
    (tmp_path / f".other.partial-{TOKEN}").mkdir()
    with output_folder(tmp_path / "out", False) as stage:
        assert names(tmp_path) == {stage.name, ".out.lock", f".other.partial-{TOKEN}"}
        fill(stage)
    assert names(tmp_path) == {"out", f".other.partial-{TOKEN}"}


def test_scratch_names_differ_between_runs(tmp_path: Path) -> None:
    seen = set()
    for _ in range(3):
        with output_folder(tmp_path / "out", True) as stage:
            seen.add(stage.name)
            fill(stage)
    assert len(seen) == 3 and all(len(name) == len(".out.partial-") + 32 for name in seen)


def moved_away(folder: Path) -> None:
    """As a run leaves it that is killed between the two renames of a file system without an exchange."""
    (folder / "out").mkdir()
    fill(folder / "out", "old")
    scratch.note(folder / "out", folder / f".out.old-{TOKEN}")
    (folder / "out").rename(folder / f".out.old-{TOKEN}")


def test_output_moved_away_by_killed_run_comes_back(tmp_path: Path) -> None:
    moved_away(tmp_path)
    with pytest.raises(OutputError, match="exists and is not empty"), output_folder(tmp_path / "out", False):
        raise AssertionError("entered")
    assert names(tmp_path) == {"out"}
    assert (tmp_path / "out" / "sub" / "file").read_text() == "old"


def test_output_moved_away_by_killed_run_is_removed_once_replaced(tmp_path: Path) -> None:
    moved_away(tmp_path)
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out")
    with output_folder(tmp_path / "out", True) as stage:
        fill(stage, "newer")
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize("kind", ["folder", "link", "noted", "noted link", "foreign note"])
def test_planted_folder_does_not_become_output(tmp_path: Path, kind: str) -> None:
    """Neither by its name, nor by a note that somebody else wrote."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("mine")
    planted, note = tmp_path / "in" / f".out.old-{TOKEN}", tmp_path / "in" / ".out.moved"
    planted.parent.mkdir()
    if "link" in kind:
        planted.symlink_to(tmp_path / "outside")
    else:
        planted.mkdir()
    if kind == "foreign note":  # the planted folder's own identity, in a file with a second name
        (tmp_path / "outside" / "note").write_text(f"{planted.name}\n{scratch._identity(planted)}\n")
        os.link(tmp_path / "outside" / "note", note)
    elif "noted" in kind:
        note.write_text(f"{planted.name}\n1:1\n" if kind == "noted" else f"{planted.name}\n")
    with pytest.raises(RuntimeError), output_folder(tmp_path / "in" / "out", False):
        raise RuntimeError
    assert names(tmp_path / "in") == {planted.name}
    assert (tmp_path / "outside" / "file").read_text() == "mine"


def test_output_written_while_waiting_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run finishes between the first look and the lock."""
    real = scratch.clean

    def meanwhile(final: Path) -> None:
        final.mkdir()
        fill(final, "theirs")
        real(final)

    monkeypatch.setattr(scratch, "clean", meanwhile)
    with pytest.raises(OutputError, match="exists and is not empty"), output_folder(tmp_path / "out", False):
        raise AssertionError("entered")
    assert (tmp_path / "out" / "sub" / "file").read_text() == "theirs"


@pytest.mark.parametrize("name", ["out", "o[u]t", "o*t", "out.partial-7"])
def test_leftovers_of_other_outputs_stay(tmp_path: Path, name: str) -> None:
    mine = {f".{name}.partial-{TOKEN}"}
    others = {
        f".oXt.partial-{TOKEN}", f".out.partial-7.partial-{TOKEN}", ".out.partial-mine", ".out.partial-7",
        f".out2.partial-{TOKEN}", f".{name}.old-{TOKEN}",
    }  # fmt: skip
    others -= mine
    for folder in mine | others:
        (tmp_path / folder).mkdir()
    with output_folder(tmp_path / name, True) as stage:
        fill(stage)
    assert names(tmp_path) == {name} | others


def test_parent_folders_of_failed_output_are_removed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(RuntimeError), output_folder(tmp_path / "mine" / "deep" / "er" / "out", False):
        raise RuntimeError
    assert names(tmp_path) == {"mine"} and names(tmp_path / "mine") == set()
    with pytest.raises(RuntimeError), output_folder(tmp_path / "mine" / "deep" / "er" / "out", False):
        (tmp_path / "mine" / "deep" / "other").write_text("of somebody else")
        raise RuntimeError
    assert names(tmp_path / "mine" / "deep") == {"other"}


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("step", ["rename", "sync"])
@pytest.mark.parametrize("exists", [True, False])
def test_failed_step_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool, step: str, exists: bool
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    if exists:
        (tmp_path / "out").mkdir()
        fill(tmp_path / "out", "old")
    if not exchange:
        monkeypatch.setattr(disk, "exchange_names", lambda a, b: False)
    elif step == "rename":
        monkeypatch.setattr(disk, "exchange_names", fail)
    real = disk.sync
    with pytest.raises(OSError, match="Input/output"), output_folder(tmp_path / "out", True) as stage:
        fill(stage)
        if step == "rename":
            monkeypatch.setattr(Path, "replace", fail)
        else:
            monkeypatch.setattr(disk, "sync", lambda path: fail() if path == tmp_path else real(path))
    assert names(tmp_path) == ({"out"} if exists else set())
    assert not exists or (tmp_path / "out" / "sub" / "file").read_text() == "old"


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EINVAL, errno.ENOSYS])
def test_failing_exchange_differs_from_unsupported_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_: object) -> int:
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(disk, "_renameat2", fail)
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", "old")
    missing = number in (errno.EINVAL, errno.ENOSYS)
    with (
        contextlib.nullcontext() if missing else pytest.raises(OSError, match=os.strerror(number)),
        output_folder(tmp_path / "out", True) as stage,
    ):
        fill(stage)
    assert names(tmp_path) == {"out"}
    assert (tmp_path / "out" / "sub" / "file").read_text() == ("new" if missing else "old")


def test_replaced_folder_that_stays_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.unlink

    def unlink(path: str, *more: object, **words: object) -> None:
        if str(path).endswith("mine"):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM), path)
        real(path, *more, **words)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "unlink", unlink)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("old")
    with (
        pytest.raises(OutputError, match=r"complete and in place.*cannot be removed: Operation not") as failure,
        output_folder(tmp_path / "out", True) as stage,
    ):
        fill(stage)
    assert str(stage) in str(failure.value.next_step)
    assert names(tmp_path) == {"out", stage.name} and names(tmp_path / "out") == {"sub"}
    monkeypatch.undo()
    with output_folder(tmp_path / "out", True) as stage:
        fill(stage)
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize("where", ["folder", "file"])
@pytest.mark.parametrize("number", [errno.EIO, errno.EINVAL])
def test_sync_failure_is_ignored_only_where_unsupported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, number: int
) -> None:
    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode) == (where == "folder"):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    passes = where == "folder" and number == errno.EINVAL
    with (
        contextlib.nullcontext() if passes else pytest.raises(OSError, match=r"\.out\.partial-"),
        output_folder(tmp_path / "out", False) as stage,
    ):
        fill(stage)
    assert names(tmp_path) == ({"out"} if passes else set())


def test_large_files_sync_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two of them Ctrl-C is heard."""
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(disk, "SYNC_BLOCK", 10)
    monkeypatch.setattr(
        disk, "_sync_file_range", lambda fd, at, length, how: calls.append((at.value, length.value)) or 0
    )
    with output_folder(tmp_path / "out", False) as stage:
        (stage / "file").write_bytes(b"x" * 25)
    assert calls == [(0, 10), (10, 10), (20, 10)]


def test_failed_sync_of_piece_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        ctypes.set_errno(errno.EIO)
        return -1

    monkeypatch.setattr(disk, "_sync_file_range", fail)
    with pytest.raises(OSError, match="Input/output"), output_folder(tmp_path / "out", False) as stage:
        fill(stage)
    assert names(tmp_path) == set()


def test_output_among_hub_blobs_is_refused(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "0").write_text("weights")
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/0"))
    with (
        pytest.raises(OutputError, match="lies inside an input"),
        output_folder(blobs, True, inputs=[snapshot]),
    ):
        raise AssertionError("entered")
    assert (blobs / "0").read_text() == "weights"


def test_lock_of_other_kind_is_not_waited_for(tmp_path: Path) -> None:
    with (
        FileLock(tmp_path / "theirs"),
        pytest.raises(Timeout),
        output_folder(tmp_path / "out", False),
        FileLock(tmp_path / "theirs", timeout=0),
    ):
        raise AssertionError("entered")


def contend(folder: Path, rounds: int) -> None:
    """Exit code 1 if another process is in the output folder at the same time."""
    for _ in range(rounds):
        with contextlib.suppress(OutputError), output_folder(folder / "out", True):
            (folder / "inside").touch(exist_ok=False)
            time.sleep(0.0005)
            (folder / "inside").unlink()


def test_lock_admits_one_writer(tmp_path: Path) -> None:
    """The lock file goes when its holder does: who waited for it has a file that nobody else can find."""
    forks = multiprocessing.get_context("forkserver")
    children = [forks.Process(target=contend, args=(tmp_path, 60)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 4
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("4242\n{host}\n", r"process \(PID 4242\) is"),
        ("4242\nfar-away\n", r"process \(PID 4242 on far-away\) is"),
        ("4242", r"process \(PID 4242\) is"),
        ("", "process is"),
    ],
)
def test_lock_names_its_holder(tmp_path: Path, text: str, said: str) -> None:
    with FileLock(tmp_path / ".out.lock"):
        (tmp_path / ".out.lock").write_text(text.format(host=socket.gethostname()))
        with pytest.raises(OutputError, match=said), output_folder(tmp_path / "out", False):
            raise AssertionError("entered")
        assert names(tmp_path) == {".out.lock"}


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "folder", "fifo"])
def test_planted_lock_is_refused_and_not_written(tmp_path: Path, kind: str) -> None:
    target, lock = tmp_path / "outside", tmp_path / "in" / ".out.lock"
    lock.parent.mkdir()
    if kind != "dangling link":
        target.write_text("mine")
    if "link" in kind and kind != "hard link":
        lock.symlink_to(target)
    elif kind == "hard link":
        os.link(target, lock)
    elif kind == "folder":
        lock.mkdir()
    else:
        os.mkfifo(lock)
    with pytest.raises(OutputError, match="lock of the output is a link"), output_folder(lock.parent / "out", True):
        raise AssertionError("entered")
    assert names(lock.parent) == {".out.lock"}
    assert not target.exists() if kind == "dangling link" else target.read_text() == "mine"


def test_lock_linked_after_check_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outside").write_text("mine")
    (tmp_path / "in").mkdir()
    monkeypatch.setattr(locks, "_refuse_planted", lambda path: os.link(tmp_path / "outside", path))
    with pytest.raises(OutputError, match="lock of the output is a link"), output_folder(tmp_path / "in/out", True):
        raise AssertionError("entered")
    assert (tmp_path / "outside").read_text() == "mine"


def test_failed_folder_replaces_link_not_its_target(tmp_path: Path) -> None:
    for target in ("folder", "nothing"):
        (tmp_path / "out.failed").symlink_to(tmp_path / target)
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(GateFailed), output_folder(tmp_path / "out", False) as stage:
            fill(stage)
            raise GateFailed("logits differ")
        assert names(tmp_path) == {"out.failed", "folder"} and not (tmp_path / "out.failed").is_symlink()
        assert names(tmp_path / "folder") == set()
        shutil.rmtree(tmp_path / "out.failed")


def die_inside(folder: Path) -> None:
    without_flock(pytest.MonkeyPatch())
    with output_folder(folder / "out", False):
        os.kill(os.getpid(), signal.SIGKILL)


def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_lock_of_dead_process_is_free_without_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = multiprocessing.get_context("forkserver").Process(target=die_inside, args=(tmp_path,))
    dead.start()
    dead.join()
    assert dead.exitcode == -signal.SIGKILL and ".out.lock" in names(tmp_path)
    without_flock(monkeypatch)
    with output_folder(tmp_path / "out", False) as stage:
        fill(stage)
        with pytest.raises(OutputError, match=f"PID {os.getpid()}"), output_folder(tmp_path / "out", False):
            raise AssertionError("entered")
    assert names(tmp_path) == {"out"}


def test_output_is_synced_before_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(disk, "sync", lambda path: events.append(path.name))
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), real(a, b)))
    with output_folder(tmp_path / "out", False) as stage:
        fill(stage)
    assert events == ["file", "sub", stage.name, "rename", tmp_path.name]


@pytest.mark.parametrize("name", ["model.safetensors", "a b", "…", ".hidden", "a..b"])
def test_plain_name_accepts_and_refuses(name: str) -> None:
    assert plain_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "..\\a", "C:x", "a\0b", "a/"])
def test_plain_path_that_leaves_folder_is_refused(name: str) -> None:
    assert not plain_name(name)


@pytest.mark.parametrize("way", ["kernel", "missing", errno.EXDEV, errno.EINVAL])
@pytest.mark.parametrize("block", [1, 7, 16 * 2**20])
def test_copy_range_copies_exact_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str | int, block: int
) -> None:
    def cannot(*_: object) -> int:
        raise OSError(way, "cannot")

    monkeypatch.setattr(disk, "COPY_BLOCK", block)
    if way == "missing":
        monkeypatch.delattr(os, "copy_file_range")
    elif way != "kernel":
        monkeypatch.setattr(os, "copy_file_range", cannot)
    content = bytes(range(256)) * 3
    (tmp_path / "a").write_bytes(content)
    with (tmp_path / "a").open("rb") as source, (tmp_path / "b").open("wb", buffering=0) as target:
        write_at(target.fileno(), b"tail", 604)
        copy_range(source.fileno(), 5, 600, target.fileno(), 4)
        write_at(target.fileno(), b"head", 0)
        with pytest.raises(EOFError, match="ended"):
            copy_range(source.fileno(), 700, 100, target.fileno(), 608)
    assert (tmp_path / "b").read_bytes()[:608] == b"head" + content[5:605] + b"tail"


def test_copy_range_read_error_is_not_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "copy_file_range", broken)
    (tmp_path / "a").write_bytes(b"x" * 9)
    with (
        (tmp_path / "a").open("rb") as source,
        (tmp_path / "b").open("wb") as target,
        pytest.raises(OSError, match="Input/output error"),
    ):
        copy_range(source.fileno(), 0, 9, target.fileno(), 0)


def test_hash_folder_and_read_json_work(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.json").write_text('{"x": 1}')
    found = hash_folder(tmp_path)
    assert found == {"a/b.json": sealed.FileHash(sealed.sha256(tmp_path / "a" / "b.json"), 8)}
    assert read_json(tmp_path / "a" / "b.json") == {"x": 1}
    with pytest.raises(InputError, match="more than 4 bytes"):
        read_json(tmp_path / "a" / "b.json", limit=4)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="not valid JSON"):
        read_json(tmp_path / "deep.json")


def test_check_space_full_disk_is_refused_before_first_byte(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="are free"):
        disk.check_space(tmp_path / "not" / "there", 10**18)
    disk.check_space(tmp_path, 1)
