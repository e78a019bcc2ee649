"""files.py: output folders that appear whole or not at all."""

import errno
import os
import stat
from pathlib import Path

import pytest
from filelock import FileLock

from lora_export import files
from lora_export.errors import GateFailed, InputError, OutputError
from lora_export.files import (
    copy_range,
    failed_folder,
    hash_folder,
    output_folder,
    plain_name,
    read_json,
    write_at,
)


def fill(folder: Path, text: str = "new") -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "file").write_text(text)


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_success_leaves_the_output_alone(tmp_path: Path) -> None:
    with output_folder(tmp_path / "deep" / "out", False) as stage:
        assert names(tmp_path / "deep") == {stage.name, ".out.lock"}
        assert stage.name.startswith(".out.partial-")
        fill(stage)
        assert not (tmp_path / "deep" / "out").exists()
    assert names(tmp_path / "deep") == {"out"}
    assert (tmp_path / "deep" / "out" / "sub" / "file").read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, OSError])
def test_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), output_folder(tmp_path / "out", False) as stage:
        fill(stage)
        raise error
    assert names(tmp_path) == set()


def test_failure_keeps_the_old_output(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", "old")
    with pytest.raises(RuntimeError), output_folder(tmp_path / "out", True) as stage:
        fill(stage)
        raise RuntimeError
    assert names(tmp_path) == {"out"}
    assert (tmp_path / "out" / "sub" / "file").read_text() == "old"


def test_failed_gate_is_kept_aside_and_says_why(tmp_path: Path) -> None:
    for attempt in ("first", "second"):
        with pytest.raises(GateFailed), output_folder(tmp_path / "out", False) as stage:
            fill(stage, attempt)
            raise GateFailed("logits differ by 3", expected="at most 1")
        assert names(tmp_path) == {"out.failed"}
        kept = failed_folder(tmp_path / "out")
        assert (kept / "sub" / "file").read_text() == attempt
        assert "logits differ by 3" in (kept / "FAILED").read_text()
        assert "at most 1" in (kept / "FAILED").read_text()


def test_force_replaces_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale").write_text("old")
    with output_folder(tmp_path / "out", True) as stage:
        fill(stage)
        assert names(tmp_path / "out") == {"stale"}
    assert names(tmp_path / "out") == {"sub"}
    assert names(tmp_path) == {"out"}


def test_force_replaces_without_an_atomic_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    test_force_replaces_as_a_whole(tmp_path)


def test_existing_output_needs_force(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("old")
    with (
        pytest.raises(OutputError, match="exists and is not empty") as caught,
        output_folder(tmp_path / "out", False),
    ):
        raise AssertionError("entered")
    assert "--force" in str(caught.value.next_step)
    assert names(tmp_path) == {"out"}


def test_empty_output_needs_no_force(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with output_folder(tmp_path / "out", False) as stage:
        fill(stage)
    assert names(tmp_path / "out") == {"sub"}


@pytest.mark.parametrize("force", [False, True])
def test_output_that_is_a_file_or_link_is_refused(tmp_path: Path, force: bool) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for name in ("file", "link"):
        with pytest.raises(OutputError, match="file or a link"), output_folder(tmp_path / name, force):
            raise AssertionError("entered")
    assert names(tmp_path) == {"file", "target", "link"}


@pytest.mark.parametrize("output", ["in", "in/out", ".", "link/out", "in/../in"])
def test_output_and_input_may_not_overlap(tmp_path: Path, output: str) -> None:
    (tmp_path / "work" / "in").mkdir(parents=True)
    (tmp_path / "work" / "link").symlink_to(tmp_path / "work" / "in")
    source, target = tmp_path / "work" / "in", tmp_path / "work" / output
    with pytest.raises(OutputError, match="lie inside each other"), output_folder(target, True, inputs=[source]):
        raise AssertionError("entered")
    assert names(tmp_path / "work") == {"in", "link"}


def test_input_with_a_similar_name_is_no_overlap(tmp_path: Path) -> None:
    (tmp_path / "out-base").mkdir()
    with output_folder(tmp_path / "out", False, inputs=[tmp_path / "out-base"]) as stage:
        fill(stage)


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    for umask, folder_mode, file_mode in ((0o022, 0o755, 0o644), (0o077, 0o700, 0o600), (0o002, 0o775, 0o664)):
        before = os.umask(umask)
        try:
            with output_folder(tmp_path / "out", True) as stage:
                fill(stage)
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == folder_mode
        assert stat.S_IMODE((tmp_path / "out" / "sub" / "file").stat().st_mode) == file_mode


def test_leftovers_of_a_killed_run_are_cleaned(tmp_path: Path) -> None:
    (tmp_path / ".out.partial-99999").mkdir()
    (tmp_path / ".out.partial-99999" / "half").write_text("x")
    (tmp_path / ".out.lock").write_text("99999")
    (tmp_path / ".other.partial-1").mkdir()
    with output_folder(tmp_path / "out", False) as stage:
        assert names(tmp_path) == {stage.name, ".out.lock", ".other.partial-1"}
        fill(stage)
    assert names(tmp_path) == {"out", ".other.partial-1"}


def test_output_that_a_killed_run_had_moved_away_comes_back(tmp_path: Path) -> None:
    (tmp_path / ".out.old-99999").mkdir()
    fill(tmp_path / ".out.old-99999", "old")
    with pytest.raises(OutputError, match="exists and is not empty"), output_folder(tmp_path / "out", False):
        raise AssertionError("entered")
    assert names(tmp_path) == {"out"}
    assert (tmp_path / "out" / "sub" / "file").read_text() == "old"


def test_output_written_while_waiting_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run finishes between the first look and the lock."""
    real = files._clean_leftovers

    def meanwhile(final: Path) -> None:
        final.mkdir()
        fill(final, "theirs")
        real(final)

    monkeypatch.setattr(files, "_clean_leftovers", meanwhile)
    with pytest.raises(OutputError, match="exists and is not empty"), output_folder(tmp_path / "out", False):
        raise AssertionError("entered")
    assert (tmp_path / "out" / "sub" / "file").read_text() == "theirs"


def test_second_writer_is_told_who_holds_the_output(tmp_path: Path) -> None:
    with FileLock(tmp_path / ".out.lock"):
        (tmp_path / ".out.lock").write_text("4242")
        with pytest.raises(OutputError, match="PID 4242"), output_folder(tmp_path / "out", False):
            raise AssertionError("entered")
        assert names(tmp_path) == {".out.lock"}


def test_everything_is_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(files, "_sync", lambda path: events.append(path.name))
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), real(a, b)))
    with output_folder(tmp_path / "out", False) as stage:
        fill(stage)
    assert events == ["file", "sub", stage.name, "rename", tmp_path.name]


@pytest.mark.parametrize("name", ["model.safetensors", "a b", "…", ".hidden", "a..b"])
def test_plain_names(name: str) -> None:
    assert plain_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "..\\a", "C:x", "a\0b", "a/"])
def test_names_that_leave_the_folder(name: str) -> None:
    assert not plain_name(name)


@pytest.mark.parametrize("way", ["kernel", "missing", errno.EXDEV, errno.EINVAL])
@pytest.mark.parametrize("block", [1, 7, 16 * 2**20])
def test_copy_range_copies_exactly_that_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str | int, block: int
) -> None:
    def cannot(*_: object) -> int:
        raise OSError(way, "cannot")

    monkeypatch.setattr(files, "COPY_BLOCK", block)
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
        with pytest.raises(OSError, match="ended"):
            copy_range(source.fileno(), 700, 100, target.fileno(), 608)
    assert (tmp_path / "b").read_bytes()[:608] == b"head" + content[5:605] + b"tail"


def test_a_read_error_while_copying_is_no_reason_to_try_another_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_hash_folder_and_read_json(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.json").write_text('{"x": 1}')
    found = hash_folder(tmp_path)
    assert found == {"a/b.json": {"sha256": files.sha256(tmp_path / "a" / "b.json"), "size": 8}}
    assert read_json(tmp_path / "a" / "b.json") == {"x": 1}
    with pytest.raises(InputError, match="more than 4 bytes"):
        read_json(tmp_path / "a" / "b.json", limit=4)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="not valid JSON"):
        read_json(tmp_path / "deep.json")


def test_full_disk_is_refused_before_the_first_byte(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="are free"):
        files.check_space(tmp_path / "not" / "there", 10**18)
    files.check_space(tmp_path, 1)
