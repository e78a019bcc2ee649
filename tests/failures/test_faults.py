"""A fault at every single system call: the output is the old state or the whole new one, and nothing is left."""

import errno
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lora_export import merging
from tests.daily import daily
from tests.failures.commands import Forked, everything, invoke, merge_words
from tests.failures.faults import Faults, failing, kill_at

# shutil.copyfile goes on in another way where the kernel cannot copy; that is no failure.
REPLACED = {("sendfile", errno.EIO)}


@pytest.fixture
def new(work: Path) -> dict[str, str]:
    """The output as it should become; there is none yet."""
    assert invoke(*merge_words(work)).exit_code == 0
    state = everything(work / "out")
    shutil.rmtree(work / "out")
    return state


@pytest.fixture(params=["no output before", "an older output"])
def old(request: pytest.FixtureRequest, work: Path, new: dict[str, str]) -> Callable[[], dict[str, str]]:
    """Puts work/out into the state before the merge, and returns that of all of work."""
    before = work.parent / "before"
    if request.param == "an older output":
        assert invoke(*merge_words(work, "--dtype", "float16")).exit_code == 0
        (work / "out" / "mine.txt").write_text("of the user")
        (work / "out").rename(before)

    def restore() -> dict[str, str]:
        shutil.rmtree(work / "out", ignore_errors=True)
        if before.exists():
            shutil.copytree(before, work / "out")
        return everything(work)

    return restore


def below(state: dict[str, str], folder: str) -> dict[str, str]:
    return {k.removeprefix(f"{folder}/"): v for k, v in state.items() if k.startswith(f"{folder}/")}


def check_failed(result: Any, where: str = "") -> None:
    """Exit code 1, in plain words."""
    text = f"{where}: {result.output}"
    assert result.exit_code == 1, text
    assert "error: " in result.stderr, text
    assert "Traceback" not in result.output and "internal error" not in result.output, text


def counted(faults: Faults, words: list[Any]) -> int:
    faults.disarm()
    assert invoke(*words).exit_code == 0
    return len(faults.seen)


def test_merge_survives_failure_of_every_write(
    work: Path, new: dict[str, str], old: Callable[[], dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    words, before = merge_words(work, "--force"), old()
    faults = Faults.of_writing(monkeypatch, work)
    points = counted(faults, words)
    assert points > 60 and {"open", "write", "pwrite", "copy_file_range", "fsync", "mkdir"} <= set(faults.seen)
    for i in range(1, points + 1):
        faults.disarm()
        before = old()
        number = (errno.ENOSPC, errno.EIO)[i % 2]
        faults.arm(i, failing(number))
        result = invoke(*words)
        name = faults.seen[i - 1]
        where = f"{errno.errorcode[number]} at call {i} of {points}, {name}"
        faults.disarm()
        if result.exit_code == 0 and (name, number) in REPLACED:
            assert everything(work / "out") == new, where
        else:
            check_failed(result, where)
            assert everything(work) == before, where


@pytest.mark.parametrize("first", daily(range(1, 5), (1,)))
def test_merge_survives_kill_at_every_write(
    first: int, work: Path, new: dict[str, str], old: Callable[[], dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    words, before = merge_words(work, "--force"), old()
    with monkeypatch.context() as patch:
        points = counted(Faults.of_writing_and_removing(patch, work), words)
    reached = set()
    for i in sorted({*range(first, points + 1, 4), *range(points - 3, points + 1)}):  # the last leave the new one
        before = old()
        child = Forked.start(work.parent / "log", *words, before=partial(kill_at, i, work))
        where = f"killed at call {i} of {points}"
        assert child.wait() == -signal.SIGKILL, f"{where}: {child.said()}"
        left = everything(work / "out") if (work / "out").exists() else {}
        assert left == new or left == below(before, "out"), where
        reached.add("new" if left == new else "old")
        assert invoke(*words).exit_code == 0, where
        assert everything(work / "out") == new, where
        assert {p.name for p in work.iterdir()} == {"base", "adapter", "out"}, where
    after = everything(work)
    assert all(below(after, folder) == below(before, folder) for folder in ("base", "adapter"))
    assert reached == {"old", "new"}


TRACED = {
    "pwrite64": "pwrite", "write": "write", "writev": "writev", "pwritev": "pwritev", "sendfile": "sendfile",
    "copy_file_range": "copy_file_range", "openat": "open", "mkdir": "mkdir", "mkdirat": "mkdir",
    "rename": "replace", "renameat2": "renameat2", "fsync": "fsync", "fdatasync": "fdatasync",
    "ftruncate": "ftruncate", "truncate": "truncate", "fallocate": "fallocate", "link": "link", "linkat": "link",
    "symlink": "symlink", "symlinkat": "symlink", "unlink": "unlink", "unlinkat": "unlink", "rmdir": "rmdir",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_merge_system_calls_are_all_counted(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above are worth what their list of calls is worth."""
    words, log = [str(w) for w in merge_words(work)], work.parent / "trace"
    run = [sys.executable, "-c", "from lora_export.commands.main import cli; cli()", *words]
    trace = ["strace", "-f", "-y", "-o", str(log), "-e", f"trace={','.join(TRACED)}"]
    if subprocess.run([*trace, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("strace may not trace here")
    subprocess.run([*trace, *run], check=True, capture_output=True)
    calls: Counter[str] = Counter()
    for line in log.read_text().splitlines():
        name, _, rest = line.split(maxsplit=1)[1].partition("(")
        changes = name != "openat" or any(flag in rest for flag in ("O_WRONLY", "O_RDWR", "O_CREAT"))
        if name in TRACED and changes and str(work) in rest and "EEXIST" not in rest:
            calls[TRACED[name]] += 1
    shutil.rmtree(work / "out")
    faults = Faults.of_writing_and_removing(monkeypatch, work)
    counted(faults, words)
    assert calls == Counter(faults.seen)


def test_merge_survives_failure_of_every_read(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, before = merge_words(work), everything(work)
    faults = Faults.of_reading(monkeypatch, work)
    points = counted(faults, words)
    assert points > 60 and {"open", "read", "preadv", "copy_file_range"} <= set(faults.seen)
    for i in range(1, points + 1):
        faults.disarm()
        shutil.rmtree(work / "out", ignore_errors=True)
        faults.arm(i, failing(errno.EIO))
        result = invoke(*words)
        name = faults.seen[i - 1]
        faults.disarm()
        if result.exit_code != 0 or (name, errno.EIO) not in REPLACED:
            check_failed(result, f"EIO at call {i} of {points}, {name}")
            assert everything(work) == before


def after_the_plan(monkeypatch: pytest.MonkeyPatch, damage: Callable[[], Any]) -> None:
    real = merging.write_shards

    def write_shards(*arguments: Any, **more: Any) -> Any:
        damage()
        return real(*arguments, **more)

    monkeypatch.setattr(merging, "write_shards", write_shards)


@pytest.mark.parametrize("shard", [1, 2, 3, 4])
@pytest.mark.parametrize("left", [0, 0.5, 0.99])
def test_merge_base_shrinking_after_plan_is_refused(
    work: Path, monkeypatch: pytest.MonkeyPatch, shard: int, left: float
) -> None:
    path = work / "base" / f"model-0000{shard}-of-00004.safetensors"
    after_the_plan(monkeypatch, lambda: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * left)]))
    result = invoke(*merge_words(work))
    check_failed(result)
    assert all(text in result.stderr for text in (path.name, "ended early", "tensor:")), result.stderr
    assert {p.name for p in work.iterdir()} == {"base", "adapter"}


@pytest.mark.parametrize("name", ["adapter/adapter_model.safetensors", "base/tokenizer.json", "base/config.json"])
@pytest.mark.parametrize("how", ["gone", "cut"])
def test_merge_input_changing_after_plan_is_refused(
    work: Path, monkeypatch: pytest.MonkeyPatch, name: str, how: str
) -> None:
    path = work / name
    after_the_plan(monkeypatch, path.unlink if how == "gone" else lambda: path.write_bytes(b""))
    result = invoke(*merge_words(work))
    if how == "gone" or path.suffix == ".safetensors":
        check_failed(result)
        assert str(path) in result.stderr
        assert {p.name for p in work.iterdir()} == {"base", "adapter"}
    else:
        assert "Traceback" not in result.output and "internal error" not in result.output, result.output
