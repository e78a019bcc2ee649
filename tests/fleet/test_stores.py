"""What every store of a fleet promises, and how a folder keeps it."""

import contextlib
import errno
import hashlib
import os
import random
import resource
import secrets
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lora_export import records
from lora_export.contracts import Record, StoredFile
from lora_export.errors import InputError, LoraExportError, OutputError
from lora_export.fleet.stores import Store, folder, opened, writing
from lora_export.fleet.stores.folder import FolderStore
from lora_export.records import decoded, encoded
from lora_export.storage import disk
from tests.fleet.roots import KEY, PLACE, SIZES, made, record, writer_of


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "memory":
        pytest.importorskip("obstore")
        return opened(f"memory://{secrets.token_hex(8)}")
    return opened(str(tmp_path / "root"))


def below(path: Path) -> dict[str, bytes]:
    """Everything below a folder, but for empty folders."""
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


# --- every store ---------------------------------------------------------------------------------------------


def test_published_object_is_fetched_as_it_was(store: Store, tmp_path: Path) -> None:
    source = made(tmp_path / "source", "one")
    assert store.publish(source, PLACE, record("one"))
    assert not source.exists()
    assert writer_of(store, PLACE, tmp_path) == "one"
    found = store.fetch(PLACE, tmp_path / "again")
    assert found is not None and {n: f.bytes for n, f in found.files.items()} == SIZES
    assert found.created and found.tool_version and found.key == KEY


def test_second_object_at_a_place_leaves_the_first(store: Store, tmp_path: Path) -> None:
    assert store.publish(made(tmp_path / "1", "one"), PLACE, record("one"))
    names = sorted(store.names(""))
    assert not store.publish(made(tmp_path / "2", "two"), PLACE, record("two"))
    assert sorted(store.names("")) == names and not (tmp_path / "2").exists()
    assert writer_of(store, PLACE, tmp_path) == "one"


def test_object_published_again_takes_the_place(store: Store, tmp_path: Path) -> None:
    assert store.publish(made(tmp_path / "1", "one"), PLACE, record("one"), again=True)
    assert store.publish(made(tmp_path / "2", "two", {"other": 9}), PLACE, record("two"), again=True)
    assert writer_of(store, PLACE, tmp_path, {"other": 9}) == "two"
    assert len(list(store.names(PLACE))) == 2  # the record, and the file


def test_two_that_publish_again_leave_one_whole_object(store: Store, tmp_path: Path) -> None:
    assert store.publish(made(tmp_path / "0", "zero"), PLACE, record("zero"))
    with ThreadPoolExecutor(4) as pool:
        writers = [str(i) for i in range(1, 9)]
        folders = [made(tmp_path / f"again-{w}", w) for w in writers]
        won = list(pool.map(lambda f, w: store.publish(f, PLACE, record(w), again=True), folders, writers))
    assert any(won) and writer_of(store, PLACE, tmp_path) in [
        w for w, first in zip(writers, won, strict=True) if first
    ]
    assert len(list(store.names(PLACE))) == len(SIZES) + 1


def test_of_many_writers_one_wins_and_nothing_mixes(store: Store, tmp_path: Path) -> None:
    writers = [str(i) for i in range(12)]
    folders = [made(tmp_path / f"from-{w}", w) for w in writers]
    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(lambda f, w: store.publish(f, PLACE, record(w)), folders, writers))
    assert sum(won) == 1 and writer_of(store, PLACE, tmp_path) == writers[won.index(True)]
    assert len(list(store.names(PLACE))) == len(SIZES) + 1


def test_file_is_created_once_and_replaced_as_a_whole(store: Store) -> None:
    assert store.read("names/acme.json") is None and store.measure("names/acme.json") is None
    assert store.create("names/acme.json", b"first")
    assert not store.create("names/acme.json", b"second") and store.read("names/acme.json") == b"first"
    store.replace("names/acme.json", b"third")
    store.replace("names/new.json", b"fourth")
    assert store.read("names/acme.json") == b"third" and store.read("names/new.json") == b"fourth"
    found = store.measure("names/acme.json")
    assert found is not None and found.bytes == 5 and found.sha256 == hashlib.sha256(b"third").hexdigest()
    assert sorted(store.names("names")) == ["names/acme.json", "names/new.json"]


def test_file_that_many_create_has_one_maker(store: Store) -> None:
    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(lambda i: store.create("fleet.lock", str(i).encode()), range(24)))
    assert sum(made) == 1 and store.read("fleet.lock") == str(made.index(True)).encode()


def test_records_of_a_place_come_by_key(store: Store, tmp_path: Path) -> None:
    assert store.records("objects") == {}
    keys = [f"{i:064x}" for i in range(3)]
    for key in keys:
        store.publish(made(tmp_path / key, key, {"a": 1}), f"objects/{key}", record(key, key))
    store.replace("objects/stray", b"")
    assert {k: decoded(raw, k).outcome.worker for k, raw in store.records("objects").items()} == {
        k: k for k in keys
    }


def test_removed_object_or_file_is_gone(store: Store, tmp_path: Path) -> None:
    store.publish(made(tmp_path / "1", "one"), PLACE, record("one"))
    store.replace("names/acme.json", b"{}")
    store.remove(PLACE)
    store.remove("objects/never-there")
    assert list(store.names("")) == ["names/acme.json"] and store.fetch(PLACE, tmp_path / "out") is None
    store.remove("names/acme.json")
    assert list(store.names("")) == []


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a//b", "a/./b", "a/..", "", ".", "a\\b", "c:d", "a\0b"])
def test_name_that_leads_out_of_the_root_is_refused(store: Store, tmp_path: Path, name: str) -> None:
    source = made(tmp_path / "source", "one")
    for act in (
        lambda: store.read(name),
        lambda: store.create(name, b""),
        lambda: store.replace(name, b""),
        lambda: store.publish(source, name, record("one")),
        lambda: store.fetch(name, tmp_path / "out"),
        lambda: store.remove(name),
        lambda: store.records(name),
    ):
        with pytest.raises(InputError, match="not a name within a root"):
            act()
    assert below(source) and not (tmp_path / "x").exists()


def test_fetched_object_with_another_byte_is_refused(store: Store, tmp_path: Path) -> None:
    store.publish(made(tmp_path / "1", "one"), PLACE, record("one"))
    name = next(n for n in store.names(PLACE) if n.endswith("onnx/model.onnx"))
    for wrong in (b"x" * 1500, b"short"):
        store.replace(name, wrong)
        with pytest.raises(InputError, match=r"was changed after it was written: onnx/model\.onnx"):
            store.fetch(PLACE, tmp_path / "out")
    store.remove(name)
    with pytest.raises(InputError, match=r"onnx/model\.onnx is missing"):
        store.fetch(PLACE, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_link_in_an_object_is_not_published(store: Store, tmp_path: Path) -> None:
    source = made(tmp_path / "source", "one")
    (source / "link").symlink_to("/etc/hostname")
    with pytest.raises(OutputError, match="regular files"):
        store.publish(source, PLACE, record("one"))
    assert (source / "merged/model.bin").is_file() and list(store.names("")) == []


# --- records -------------------------------------------------------------------------------------------------


def test_record_with_any_byte_changed_is_refused() -> None:
    raw = encoded(record("one"))
    assert decoded(raw, "here") == record("one")
    for at in range(len(raw)):
        changed = raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]
        with pytest.raises(InputError, match="does not match its digest"):
            decoded(changed, "here")
    for cut in (b"", raw[:-1], raw[: len(raw) // 2], raw + b"\n"):
        with pytest.raises(InputError, match="does not match its digest"):
            decoded(cut, "here")


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a//b", ""])
def test_record_of_a_file_outside_its_folder_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="outside its folder"):
        decoded(encoded(records.finished(record("one"), {name: disk_file()})), "here")
    if name:
        with pytest.raises(InputError, match="outside its folder"):
            decoded(encoded(records.finished(record("one"), {}, name)), "here")


def disk_file() -> StoredFile:
    return StoredFile(1, "0" * 64)


def test_record_of_another_version_is_refused() -> None:
    from dataclasses import replace

    with pytest.raises(InputError, match="of version 99"):
        decoded(encoded(replace(record("one"), schema_version=99)), "here")


# --- a folder ------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "root")


def test_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="not a folder"):
        opened(str(tmp_path / "file"))
    assert isinstance(opened(f"file://{tmp_path}/root"), FolderStore)


def test_opened_root_is_not_made_before_something_is_written(root: FolderStore) -> None:
    assert root.read("fleet.json") is None and root.records("objects") == {} and list(root.names("")) == []
    assert not root.root.exists()


@pytest.mark.parametrize("same_disk", [True, False])
def test_folder_is_moved_on_one_disk_and_copied_to_another(
    root: FolderStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_disk: bool
) -> None:
    source = made(tmp_path / "source", "one")
    before = (source / "merged/model.bin").stat().st_ino
    if not same_disk:
        other_disk(monkeypatch, source)
    assert root.publish(source, PLACE, record("one"))
    assert ((root.root / PLACE / "merged/model.bin").stat().st_ino == before) == same_disk
    assert not source.exists() and writer_of(root, PLACE, tmp_path) == "one"


def other_disk(monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    rename = Path.rename

    def refused(self: Path, target: Path) -> Path:
        if self == source:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)


def test_file_with_a_second_name_is_copied_not_moved(root: FolderStore, tmp_path: Path) -> None:
    source = made(tmp_path / "source", "one")
    os.link(source / "merged/model.bin", tmp_path / "second-name")
    assert root.publish(source, PLACE, record("one"))
    with (tmp_path / "second-name").open("r+b") as file:
        file.write(b"changed")
    assert writer_of(root, PLACE, tmp_path) == "one"


def test_link_that_leads_out_of_the_root_is_refused(root: FolderStore, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    root.root.mkdir()
    (root.root / "objects").symlink_to(outside)
    (root.root / "linked").symlink_to(outside / "secret")
    source = made(tmp_path / "source", "one")
    for act in (
        lambda: root.read("objects/secret"),
        lambda: root.create("objects/new", b""),
        lambda: root.replace("objects/new", b""),
        lambda: root.publish(source, PLACE, record("one")),
        lambda: root.remove("objects/secret"),
        lambda: root.records("objects"),
        lambda: root.read("linked"),
        lambda: root.measure("linked"),
    ):
        with pytest.raises(InputError, match="link"):
            act()
    root.replace("linked", b"mine")  # the link itself is replaced
    assert (outside / "secret").read_text() == "secret" and [p.name for p in outside.iterdir()] == ["secret"]


def test_record_behind_a_link_or_in_a_pipe_is_none(root: FolderStore, tmp_path: Path) -> None:
    assert root.publish(made(tmp_path / "1", "one"), PLACE, record("one"))
    (root.root / "objects/link").symlink_to(root.root / PLACE)
    for name in ("a", "b"):
        (root.root / "objects" / name).mkdir()
    (root.root / "objects/a/record.json").symlink_to(root.root / PLACE / "record.json")
    os.mkfifo(root.root / "objects/b/record.json")
    assert list(root.records("objects")) == [KEY]


def no_links(*_: object, **__: object) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def test_file_is_created_once_where_there_are_no_links(root: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", no_links)
    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(lambda i: root.create("fleet.lock", str(i).encode()), range(24)))
    assert sum(made) == 1 and root.read("fleet.lock") == str(made.index(True)).encode()
    assert list((root.root / ".writing").iterdir()) == []


def test_claim_of_a_killed_process_does_not_hold_forever(
    root: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(folder, "CLAIM", 0.05)
    (root.root / ".writing").mkdir(parents=True)
    (root.root / ".writing/fleet.lock.claim").touch()
    assert root.create("fleet.lock", b"mine")


def test_object_is_exchanged_where_names_cannot_be(
    root: FolderStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "exchange_names", lambda a, b: False)
    assert root.publish(made(tmp_path / "1", "one"), PLACE, record("one"))
    assert root.publish(made(tmp_path / "2", "two"), PLACE, record("two"), again=True)
    assert writer_of(root, PLACE, tmp_path) == "two" and list((root.root / ".writing").iterdir()) == []


@contextlib.contextmanager
def file_limit(nbytes: int) -> Iterator[None]:
    """A disk on which no file can have more bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("same_disk", [True, False])
def test_full_disk_is_told_and_nothing_lost(
    root: FolderStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_disk: bool
) -> None:
    source = made(tmp_path / "source", "one")
    before = below(source)
    with monkeypatch.context() as patched:
        if not same_disk:
            other_disk(patched, source)
        with file_limit(1000), pytest.raises(OutputError, match="the store is full") as error:
            root.publish(source, PLACE, record("one"))
    assert "it goes on" in str(error.value) and below(source) == before
    assert list(root.names("")) == [] and list((root.root / ".writing").iterdir()) == []
    assert root.publish(source, PLACE, record("one")) and writer_of(root, PLACE, tmp_path) == "one"


def test_folder_without_rights_is_told(root: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", no_links)
    with pytest.raises(OutputError, match="does not let this user in"):
        root.create("fleet.json", b"")


# --- writers that were killed ----------------------------------------------------------------------------------


def killed_while_writing(root: Path) -> str:
    """The name of what a killed process leaves in a root."""
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        with writing.writing(root) as work:
            work.path.mkdir()
            (work.path / "half").write_bytes(b"half")
            os.write(told, work.path.name.encode())
            time.sleep(60)
        os._exit(0)
    name = os.read(ready, 200).decode()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(ready)
    os.close(told)
    return name


def test_leftover_of_a_killed_writer_is_removed_by_the_next(root: FolderStore, tmp_path: Path) -> None:
    name = killed_while_writing(root.root)
    assert (root.root / ".writing" / name / "half").is_file()
    with writing.writing(root.root) as alive:
        alive.path.mkdir()
        old = time.time() - writing.AGE - 60
        os.utime(alive.lock, (old, old))  # busy for long with one file
        root.replace("fleet.json", b"{}")
        assert not (root.root / ".writing" / name).exists() and alive.path.is_dir()
    assert list((root.root / ".writing").iterdir()) == []


def test_leftover_of_another_machine_is_removed_only_when_it_is_old(
    root: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(writing, "_kernel", lambda: "another machine")
        name = killed_while_writing(root.root)
    lock = root.root / ".writing" / f"{name}.lock"
    root.replace("fleet.json", b"{}")
    assert (root.root / ".writing" / name).is_dir()
    old = time.time() - writing.AGE - 60
    os.utime(lock, (old, old))
    root.replace("fleet.json", b"{}")
    assert list((root.root / ".writing").iterdir()) == []


def test_writer_of_another_machine_that_gives_signs_of_life_is_left(
    root: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "TOUCH", 0.0)
    monkeypatch.setattr(writing, "_take", lambda fd: None)  # locks that other machines do not see
    with writing.writing(root.root) as alive:
        alive.path.mkdir()
        old = time.time() - writing.AGE - 60
        os.utime(alive.lock, (old, old))
        alive.alive()
        with monkeypatch.context() as patched:
            patched.setattr(writing, "_kernel", lambda: "another machine")
            root.replace("fleet.json", b"{}")
        assert alive.path.is_dir()


def test_planted_link_among_leftovers_is_not_followed(root: FolderStore, tmp_path: Path) -> None:
    precious = made(tmp_path / "precious", "me")
    (root.root / ".writing").mkdir(parents=True)
    name = f"host.1.{'0' * 32}"
    (root.root / ".writing" / name).symlink_to(precious)
    (root.root / ".writing" / f"{name}.lock").touch()
    old = time.time() - writing.AGE - 60
    os.utime(root.root / ".writing" / f"{name}.lock", (old, old))
    root.replace("fleet.json", b"{}")
    assert list((root.root / ".writing").iterdir()) == [] and len(below(precious)) == len(SIZES)


@pytest.mark.slow
def test_writers_killed_at_any_moment_leave_whole_objects_or_none(root: FolderStore, tmp_path: Path) -> None:
    """Two at once, over 60 keys: each killed somewhere, and then one that lives."""
    chance, sizes = random.Random(28), {**SIZES, "onnx/model.onnx.data": 2_000_000}
    whole = 0
    for turn in range(60):
        key = f"{turn:064x}"
        place = f"objects/{key}"
        pids = [
            publishing(root, made(tmp_path / f"{turn}-{w}", f"{w}", sizes), place, record(f"{w}", key))
            for w in (1, 2)
        ]
        for pid in pids:
            time.sleep(chance.random() * 0.04)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        there = root.read(f"{place}/record.json") is not None
        whole += there
        if there:
            assert writer_of(root, place, tmp_path, sizes) in "12"
        assert root.publish(made(tmp_path / f"{turn}-3", "3", sizes), place, record("3", key)) != there
        assert writer_of(root, place, tmp_path, sizes) in ("12" if there else "3")
        for fetched in tmp_path.glob("fetched-*"):
            shutil.rmtree(fetched)
    assert 3 < whole < 57
    root.replace("fleet.json", b"{}")  # the last of them to write anything
    assert list((root.root / ".writing").iterdir()) == []
    assert sum(n.count("/") == 2 and n.endswith("record.json") for n in root.names("objects")) == 60


def publishing(store: FolderStore, source: Path, place: str, what: Record) -> int:
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(LoraExportError):
            store.publish(source, place, what)
        os._exit(0)
    return pid
