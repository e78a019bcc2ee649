"""What a user keeps between commands is whole or not there, as it was put there or removed, and within its size."""

import errno
import multiprocessing
import os
import shutil
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_export.errors import OutputError
from lora_export.storage.cache import Cache, Entry
from lora_export.storage.disk import bytes_in
from tests.daily import daily
from tests.failures.faults import Faults

KEY = "0" * 64
FILES = {"model.onnx": b"graph" * 100, "model.onnx.data": b"weights" * 1000, "below/config.json": b"{}"}
ABOUT = {"what": "a test"}


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 10**6)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return made(tmp_path / "source")


def made(folder: Path) -> Path:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def kept(cache: Cache, source: Path, key: str = KEY) -> None:
    entry = cache.open(key, ())
    try:
        entry.keep("onnx", source if source.exists() else made(source), ABOUT)
    finally:
        entry.close()


def found(cache: Cache, key: str = KEY) -> Entry:
    """Closed again at once."""
    entry = cache.open(key, ("onnx",))
    entry.close()
    return entry


def test_cache_kept_folder_is_found_as_it_was(cache: Cache, source: Path) -> None:
    assert not found(cache).found
    kept(cache, source)
    part = found(cache).found["onnx"]
    assert {name: (part.folder / name).read_bytes() for name in FILES} == FILES and part.about == ABOUT
    assert not source.exists()  # moved there
    for folder in (cache.root, cache.folder, cache.folder / KEY, part.folder.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert found(cache).found and not found(cache, "1" * 64).found


@pytest.fixture
def another_disk(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def elsewhere(old: Path, new: Path) -> Path:
        if old == source:
            raise OSError(errno.EXDEV, "another disk")
        return rename(old, new)

    monkeypatch.setattr(Path, "rename", elsewhere)


def test_cache_drawn_number_is_found_by_the_next_command(cache: Cache) -> None:
    numbers = []
    for key in ("one", "one", "other"):
        entry = cache.open(key, ())
        numbers.append(entry.drawn("seed", 2**31))
        entry.close()
    assert numbers[0] == numbers[1] != numbers[2]


def test_cache_damaged_number_is_drawn_anew(cache: Cache) -> None:
    entry = cache.open("one", ())
    first = entry.drawn("seed", 2**31)
    (entry.folder / "seed").write_text('{"number": 7}', encoding="ascii")
    found = entry.drawn("seed", 2**31)
    assert found not in (7, first)
    assert entry.drawn("seed", 2**31) == found
    entry.close()


def test_cache_on_another_disk_gets_copies(cache: Cache, source: Path, another_disk: None) -> None:
    kept(cache, source)
    part = found(cache).found["onnx"]
    assert {name: (part.folder / name).read_bytes() for name in FILES} == FILES
    assert {name: (source / name).read_bytes() for name in FILES} == FILES


def test_cache_copies_leave_room_on_the_disk(
    cache: Cache, source: Path, another_disk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_export.storage.cache._SPARE", 2**60)
    with pytest.raises(OutputError, match="No space left"):
        kept(cache, source)
    assert not list((cache.folder / KEY).iterdir())


def _flip(part: Path) -> None:
    content = bytearray((part / "files/model.onnx.data").read_bytes())
    content[50] ^= 1
    (part / "files/model.onnx.data").write_bytes(content)


def _link(part: Path) -> None:
    (part / "files/model.onnx").rename(part.parent.parent / "model.onnx")
    (part / "files/model.onnx").symlink_to("../../../model.onnx")


def _linked_part(part: Path) -> None:
    part.rename(part.with_name("elsewhere"))
    part.symlink_to("elsewhere")


HARM: dict[str, Callable[[Path], object]] = {
    "a byte": _flip,
    "a file is gone": lambda part: (part / "files/below/config.json").unlink(),
    "a file more": lambda part: (part / "files/more").write_text("more"),
    "a file is a link": _link,
    "the part is a link": _linked_part,
    "a fifo": lambda part: os.mkfifo(part / "files/fifo"),
    "the hashes": lambda part: (part / "hashes.json").write_text('{"schema_version": 1, "files": {}}'),
    "no hashes": lambda part: (part / "hashes.json").unlink(),
    "no files": lambda part: shutil.rmtree(part / "files"),
}


@pytest.mark.parametrize("harm", HARM)
def test_cache_damaged_part_is_told_removed_and_kept_anew(
    cache: Cache, source: Path, harm: str, tmp_path: Path
) -> None:
    kept(cache, made(tmp_path / "first"))
    HARM[harm](cache.folder / KEY / "onnx")
    entry = found(cache)
    assert not entry.found and len(entry.damaged) == 1 and "damaged, and is removed" in entry.damaged[0]
    assert not os.path.lexists(cache.folder / KEY / "onnx")
    kept(cache, source)
    assert found(cache).found and not found(cache).damaged


def test_cache_damaged_part_in_use_by_another_is_left_alone(cache: Cache, source: Path) -> None:
    kept(cache, source)
    other = cache.open(KEY, ("onnx",))
    _flip(cache.folder / KEY / "onnx")
    entry = found(cache)
    assert not entry.found and "removed" not in entry.damaged[0] and (cache.folder / KEY / "onnx").is_dir()
    other.close()
    assert "removed" in found(cache).damaged[0]


def test_cache_least_recently_used_go_first_and_none_in_use(tmp_path: Path, source: Path) -> None:
    keys = [str(n) * 64 for n in range(4)]
    each = Cache(tmp_path / "measured", 10**9)
    kept(each, source)
    cache = Cache(tmp_path / "cache", int(3.2 * bytes_in([each.folder])))
    for at, key in enumerate(keys[:3]):
        kept(cache, source, key)
        os.utime(cache.folder / key, (at, at))
    oldest = cache.open(keys[0], ())  # used now
    os.utime(cache.folder / keys[0], (0, 0))
    kept(cache, source, keys[3])
    assert [bool((cache.folder / key).exists()) for key in keys] == [True, False, True, True]
    oldest.close()
    small = Cache(cache.root, 100)
    with pytest.raises(OutputError, match="more than fit into"):
        kept(small, source)
    assert [path.name for path in cache.entries()] == [KEY]  # its own alone: nothing else was in use
    assert not list(cache.folder.glob(".*"))


def test_cache_of_others_is_not_used(cache: Cache, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(cache, source)
    cache.folder.chmod(0o770)
    with pytest.raises(OutputError, match="this user alone"):
        found(cache)
    cache.folder.chmod(0o700)
    cache.root.chmod(0o777)
    with pytest.raises(OutputError, match="this user alone"):
        found(cache)
    cache.root.chmod(0o755)
    assert found(cache).found
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    with pytest.raises(OutputError, match="this user alone"):
        found(cache)


@pytest.mark.parametrize("planted", ["cache", "cache/bases", f"cache/bases/{KEY}"])
def test_cache_planted_link_is_not_followed(tmp_path: Path, source: Path, planted: str) -> None:
    """One to the cache itself is the user's way to another disk."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    (tmp_path / planted).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / planted).symlink_to(elsewhere)
    cache = Cache(tmp_path / "cache", 10**6)
    if planted == "cache":
        kept(cache, source)
        assert found(cache).found
        return
    with pytest.raises(OutputError):
        kept(cache, source)
    assert not list(elsewhere.iterdir())


def test_cache_any_write_that_fails_keeps_nothing_half(
    cache: Cache, source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    faults = Faults.of_writing(monkeypatch, tmp_path)

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for nth in range(1, 60):
        shutil.rmtree(cache.root, ignore_errors=True)
        faults.arm(nth, full)
        try:
            kept(cache, source)
            done = True
        except OutputError:
            done = False
        failed = len(faults.seen) >= nth
        faults.disarm()
        entry = found(cache)
        assert not entry.damaged and (entry.found or not done)
        if not done:
            assert {name: (source / name).read_bytes() for name in FILES} == FILES
        assert not list((cache.folder / KEY).glob(".*"))
        if not failed:
            break
    assert nth > 8 and not failed


def _killed(nth: int, root: Path, source: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults.of_writing_and_removing(patch, root)
        faults.arm(nth, lambda: os.kill(os.getpid(), signal.SIGKILL))
        cache = Cache(root, 10**6)
        kept(cache, source)
        kept(Cache(root, 100_000), source, "1" * 64)


@pytest.mark.parametrize("nth", daily(range(1, 40), (3, 5, 8, 12, 20)))
def test_cache_killed_at_any_call_leaves_what_is_whole(tmp_path: Path, source: Path, nth: int) -> None:
    child = multiprocessing.get_context("fork").Process(target=_killed, args=(nth, tmp_path / "cache", source))
    child.start()
    child.join(60)
    cache = Cache(tmp_path / "cache", 10**6)
    for key in (KEY, "1" * 64):
        assert not found(cache, key).damaged
        kept(cache, source, key)
        entry = found(cache, key)
        assert entry.found and not list((cache.folder / key).glob(".*"))
    assert not list(cache.folder.glob(".*")) or cache.make_room(0, cache.folder)
    assert not list(cache.folder.glob(".*"))


def _busy(root: Path, source: Path, at: int) -> None:
    for turn in range(15):
        cache, key = Cache(root, 40_000), str((at + turn) % 4) * 64
        entry = cache.open(key, ("onnx",))
        assert not entry.damaged, entry.damaged
        if "onnx" not in entry.found:
            try:
                entry.found["onnx"] = entry.keep("onnx", made(source / f"{at}-{turn}"), ABOUT)
            except OutputError:  # the others are in use
                entry.close()
                continue
        for name, content in FILES.items():
            assert (entry.found["onnx"].folder / name).read_bytes() == content
        entry.close()


def test_cache_many_at_once_find_whole_parts(tmp_path: Path, source: Path) -> None:
    running = [
        multiprocessing.get_context("fork").Process(target=_busy, args=(tmp_path / "cache", source, at))
        for at in range(4)
    ]
    for child in running:
        child.start()
    for child in running:
        child.join(120)
    assert [child.exitcode for child in running] == [0] * 4
