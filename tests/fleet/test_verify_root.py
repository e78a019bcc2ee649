"""`lora-export verify ROOT`: whatever is wrong in a root is told by its name."""

import json
import os
import secrets
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_export import api
from lora_export.api.arguments import SILENT
from lora_export.contracts import Verification
from lora_export.errors import InputError
from lora_export.fleet.stores import Store, attempts, opened
from lora_export.fleet.stores.folder import FolderStore
from lora_export.fleet.stores.writing import writing
from lora_export.workflows.fleet.verifying import verify_root
from tests.failures.commands import invoke
from tests.fleet.roots import KEY, PLACE, SIZES, made, record

OTHER = "cd" * 32
RECORD = f"{PLACE}/record.json"


def filled(where: str, scratch: Path) -> Store:
    """Two objects, a prepared base, a verdict without evidence, and two names."""
    store = opened(where)
    for place, key in (("objects", KEY), ("objects", OTHER), ("bases", KEY)):
        assert store.publish(made(scratch / f"{place}-{key}", "one"), f"{place}/{key}", record("one", key))
    (scratch / "verdict").mkdir()
    assert store.publish(scratch / "verdict", f"failed/{'ef' * 32}", record("one", "ef" * 32))
    for name, key in (("acme", KEY), ("other", OTHER)):
        store.replace(f"names/{name}.json", json.dumps({"key": key, "place": f"objects/{key}"}).encode())
    store.replace("fleet.json", b"{}")
    return store


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stock")
    filled(str(folder / "root"), folder / "scratch")
    return folder / "root"


@pytest.fixture
def root(stock: Path, tmp_path: Path) -> FolderStore:
    shutil.copytree(stock, tmp_path / "root")
    return FolderStore(tmp_path / "root")


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "memory":
        pytest.importorskip("obstore")
        return filled(f"memory://{secrets.token_hex(8)}", tmp_path / "scratch")
    found: Store = request.getfixturevalue("root")
    return found


def failures(result: Verification) -> list[str]:
    return [f"{c.name}: {c.note}" for c in result.checks if not c.passed]


def test_whole_root_is_verified(store: Store) -> None:
    result = verify_root(store.where, SILENT)
    assert result.verified and result.verdict.startswith("every object is as its record says; not checked: what")
    assert [c.name for c in result.checks] == ["objects", "bases", "failed", "names"]
    assert result.checks[0].note.startswith(f"2 objects with {2 * len(SIZES)} files")


def full_name(store: Store, name: str) -> str:
    return next(n for n in store.names(PLACE) if n.endswith(name))


Deed = Callable[[Store], None]
DEEDS: dict[str, tuple[Deed, str]] = {
    "other bytes": (
        lambda s: s.replace(full_name(s, "onnx/model.onnx"), b"x" * 1500),
        "onnx/model.onnx has other bytes than the record says",
    ),
    "shorter": (
        lambda s: s.replace(full_name(s, "onnx/model.onnx"), b"x"),
        "onnx/model.onnx has 1 bytes, and 1,500 in the record",
    ),
    "missing": (lambda s: s.remove(full_name(s, "config.json")), "merged/config.json is missing"),
    "foreign": (lambda s: s.replace(f"{PLACE}/stray.bin", b"x"), f"{PLACE}/stray.bin is not in the record"),
    "record changed": (
        lambda s: s.replace(RECORD, (s.read(RECORD) or b"").replace(b"acme", b"acne")),
        "does not match its digest",
    ),
    "record gone": (lambda s: s.remove(f"{PLACE}/record.json"), "and no record"),
    "record of another": (
        lambda s: s.replace(f"{PLACE}/record.json", s.read(f"objects/{OTHER}/record.json") or b""),
        f"has the record of the key {OTHER}",
    ),
    "name of nothing": (
        lambda s: s.replace("names/acme.json", json.dumps({"key": "ff", "place": "objects/ff"}).encode()),
        "names/acme.json names objects/ff, which has no object",
    ),
    "name that leads elsewhere": (
        lambda s: s.replace("names/acme.json", json.dumps({"key": KEY, "place": "../x"}).encode()),
        "which is not that of its key",
    ),
    "name that is none": (lambda s: s.replace("names/acme.json", b"{"), "names/acme.json: "),
    "base": (
        lambda s: s.replace(next(n for n in s.names("bases") if n.endswith("model.bin")), b"x" * 3000),
        "bases: bases/",
    ),
    "verdict": (lambda s: s.replace(f"failed/{'ef' * 32}/record.json", b"{}"), "failed: failed/"),
}  # fmt: skip


@pytest.mark.parametrize("deed", DEEDS)
def test_whatever_is_wrong_is_told_once(store: Store, deed: str) -> None:
    act, words = DEEDS[deed]
    if deed == "record gone" and not isinstance(store, FolderStore):
        pytest.skip("an object without a record is an upload that is not finished")
    act(store)
    result = verify_root(store.where, SILENT)
    found = failures(result)
    assert not result.verified and any(words in one for one in found), found
    assert len(found) <= 3, found


def test_unfinished_uploads_are_named(tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    store = filled(f"memory://{secrets.token_hex(8)}", tmp_path)
    beside, alone = attempts.attempt_name(), attempts.attempt_name()
    store.replace(f"{PLACE}/{beside}/merged/model.bin", b"half")
    store.replace(f"objects/{'99' * 32}/{alone}/merged/model.bin", b"half")
    result = verify_root(store.where, SILENT)
    assert result.verified and "2 unfinished uploads" in result.verdict
    assert any(beside in n and alone in n for n in result.not_checked)


def test_work_of_a_killed_writer_is_named(root: FolderStore) -> None:
    pid = os.fork()
    if pid == 0:
        with writing(root.root) as work:
            made(work.path, "half")
            time.sleep(60)
        os._exit(0)
    while len(list((root.root / ".writing").rglob("*.bin"))) < 1:
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    result = verify_root(root.where, SILENT)
    assert result.verified and "1 unfinished uploads" in result.verdict


def test_link_in_an_object_is_told(root: FolderStore, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.write_bytes((root.root / PLACE / "onnx/model.onnx").read_bytes())
    (root.root / PLACE / "onnx/model.onnx").unlink()
    (root.root / PLACE / "onnx/model.onnx").symlink_to(target)
    assert "a link that leads out of the folder" in " ".join(failures(verify_root(root.where, SILENT)))


def test_object_that_is_replaced_meanwhile_is_no_failure(
    root: FolderStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, first = FolderStore.measure, iter([True])

    def replacing(self: FolderStore, name: str) -> object:
        if name.startswith(PLACE) and next(first, False):
            assert root.publish(made(tmp_path / "2", "two", {"other": 9}), PLACE, record("two"), again=True)
        return measure(self, name)

    monkeypatch.setattr(FolderStore, "measure", replacing)
    assert verify_root(root.where, SILENT).verified and not next(first, False)


def test_command_says_what_it_found_and_ends_with_3(root: FolderStore) -> None:
    good = invoke("verify", root.root)
    assert good.exit_code == 0 and "every object is as its record says" in good.stdout
    assert json.loads(invoke("verify", root.root, "--json").stdout)["verified"] is True
    root.replace(f"{PLACE}/onnx/model.onnx", b"x")
    bad = invoke("verify", root.root)
    assert bad.exit_code == 3 and f"{PLACE}/onnx/model.onnx has 1 bytes" in bad.stdout
    assert "not verified: 1 checks failed" in bad.stderr


def test_root_with_a_base_or_a_key_is_refused(root: FolderStore) -> None:
    result = invoke("verify", root.root, "--key", "x")
    assert result.exit_code == 1 and "with the root of a fleet" in result.stderr


def test_url_without_objects_is_no_root() -> None:
    pytest.importorskip("obstore")
    with pytest.raises(InputError, match="no object of a fleet was found"):
        api.verify(f"memory://{secrets.token_hex(8)}")
    with pytest.raises(InputError, match="ftp:// is no store"):
        api.verify("ftp://example.org/fleet")
