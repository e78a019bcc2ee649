"""Links, FIFOs and second names put in the place of a command's files, and what they must not bring about.

A command runs unharmed, while its writes are recorded. Then it runs again for each path that it read or wrote, with
something in that place that leads out of the folder: nothing outside may be changed, read or deleted.
"""

import json
import os
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import Result

from tests.failures.commands import invoke

KINDS = ("link", "folder link", "dangling link", "hard link", "fifo")
MARK = "PLANTED-6f1d0c"
WEIGHTS = {".safetensors", ".onnx", ".data", ".bin", ".onnx_adapter"}
TOKEN = re.compile(r"[0-9a-f]{32}")
LONGEST = 120  # seconds that a command may take, with a FIFO in its way


@dataclass(frozen=True)
class Scene:
    """make: fills a folder with inputs; words: the command in a copy of it; notices: any change must fail it."""

    name: str
    make: Callable[[Path], None]
    words: Callable[[Path], list[object]]
    notices: bool = False


@dataclass(frozen=True)
class Unharmed:
    """What a command reads and writes, as paths relative to its folder; weights: what it leaves of them."""

    inputs: tuple[str, ...]
    stable: tuple[str, ...]
    scratch: tuple[str, ...]
    weights: dict[str, bytes]


class _Recorder:
    """Paths that this process opens to write, makes, or renames to, while `seen` is a set."""

    def __init__(self) -> None:
        self.seen: set[str] | None = None
        sys.addaudithook(self._heard)

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.seen is None:
            return
        if (
            event == "open"
            and isinstance(arguments[2], int)
            and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        ):
            self.seen.add(os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes) else "")
        elif event == "os.mkdir":
            self.seen.add(os.fsdecode(arguments[0]))
        elif event in ("os.rename", "os.link", "os.symlink"):
            self.seen.add(os.fsdecode(arguments[1]))


_recorder: list[_Recorder] = []  # an audit hook stays for as long as the process lives


@contextmanager
def recorded() -> Iterator[set[str]]:
    if not _recorder:
        _recorder.append(_Recorder())
    seen: set[str] = set()
    _recorder[0].seen = seen
    try:
        yield seen
    finally:
        _recorder[0].seen = None


def below(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def unharmed(scene: Scene, stock: Path, work: Path) -> Unharmed:
    shutil.copytree(stock, work)
    before = {str(p.relative_to(work)) for p in below(work)}
    with recorded() as seen:
        result = invoke(*scene.words(work))
    assert result.exit_code == 0, f"{scene.name}: {result.output}"
    after = {str(p.relative_to(work)) for p in below(work)}
    assert not {p for p in after if TOKEN.search(p) or Path(p).name.endswith((".lock", ".partial"))}, after
    written = {str(Path(p).relative_to(work)) for p in seen if p.startswith(f"{work}/")} | (after - before)
    outputs = {p.split("/")[0] for p in written if not p.startswith(".")}
    written |= {f".{name}.moved" for name in outputs}
    weights = {p: (work / p).read_bytes() for p in after if Path(p).suffix in WEIGHTS}
    return Unharmed(
        # What a person names may be a link of theirs; what lies in it comes with the model.
        tuple(sorted(p for p in before if "/" in p)),
        tuple(sorted(p for p in written if not TOKEN.search(p))),
        tuple(sorted(p for p in written if TOKEN.search(p))),
        weights,
    )


# --- a cell -------------------------------------------------------------------------------------------------


def marked(path: Path, target: Path) -> None:
    """A copy of a file that is still read, and is known again."""
    data = path.read_bytes()
    try:
        value = json.loads(data)
    except ValueError:
        value = None
    if isinstance(value, dict):
        target.write_text(json.dumps(value | {"planted": MARK}))
    elif path.suffix in WEIGHTS:
        target.write_bytes(data[:-8] + bytes(b ^ 1 for b in data[-8:]))
    else:
        target.write_bytes(data + MARK.encode())


def prepare_outside(outside: Path, original: Path) -> None:
    """What links will lead to: copies of the original, or files of a person."""
    (outside / "folder").mkdir(parents=True)
    (outside / "folder" / "mine.txt").write_text(MARK)
    (outside / "file").write_text(MARK)
    if original.is_dir() and not original.is_symlink():
        for path in [p for p in below(original) if p.is_file()]:
            copy = outside / "folder" / path.relative_to(original)
            copy.parent.mkdir(parents=True, exist_ok=True)
            marked(path, copy)
    elif original.is_file():
        marked(original, outside / "file")
        marked(original, outside / "folder" / original.name)


def plant(path: Path, kind: str, outside: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "hard link":
        os.link(outside / "file", path)
    else:
        path.symlink_to(outside / {"link": "file", "folder link": "folder", "dangling link": "new"}[kind])


def state(folder: Path) -> dict[str, tuple[Any, ...]]:
    return {
        str(p.relative_to(folder)): (p.lstat().st_mode, p.lstat().st_mtime_ns, p.read_bytes())
        if p.is_file()
        else (p.lstat().st_mode,)
        for p in below(folder)
    }


@contextmanager
def soon() -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"the command did not end within {LONGEST} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, LONGEST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check(scene: Scene, known: Unharmed, work: Path, outside: Path, paths: list[str], kind: str) -> None:
    """Plant at the paths of a fresh `work`, run the command, and see what came of it."""
    where = f"{scene.name}: {kind} at {', '.join(paths)}"
    prepare_outside(outside, work / paths[0])
    for path in paths:
        plant(work / path, kind, outside)
    before, there = state(outside), {p.name for p in work.iterdir()}
    with soon():
        result = invoke(*scene.words(work))
    text = f"{where}: {result.exit_code} {result.output}"
    assert "Traceback" not in result.output and "internal error" not in result.output, text
    assert state(outside) == before, f"changed outside: {text}"
    allowed = there | {Path(p).parts[0] for p in known.stable if not p.startswith(".")}
    assert {p.name for p in work.iterdir()} <= allowed, f"left behind: {text}"
    if scene.notices:
        assert result.exit_code != 0, f"not noticed: {text}"
    if kind != "hard link":  # a file with two names is a file of the folder
        _check_unread(known, work, set(paths), result, text)
        if result.exit_code == 0 and any(p in known.inputs and Path(p).suffix in WEIGHTS for p in paths):
            kept = {p: data for p, data in known.weights.items() if p not in paths}
            assert kept == {p: (work / p).read_bytes() for p in kept}, f"weights were read: {text}"


def _check_unread(known: Unharmed, work: Path, planted: set[str], result: Result, text: str) -> None:
    assert MARK not in result.output, f"read into the talk: {text}"
    for path in below(work):
        name = str(path.relative_to(work))
        if name in planted or (name in known.inputs and name not in known.stable):
            continue
        assert not path.is_symlink(), f"{name} is a link: {text}"
        if path.is_file():
            assert MARK.encode() not in path.read_bytes(), f"read into {name}: {text}"


def cells(known: Unharmed) -> list[tuple[list[str], str]]:
    """Each path and each kind; names that nobody can guess are planted together."""
    single = [[p] for p in (*known.inputs, *known.stable)]
    groups = [*single, *([list(_outermost_last(known.scratch))] if known.scratch else [])]
    return [(paths, kind) for paths in groups for kind in KINDS]


def _outermost_last(paths: tuple[str, ...]) -> list[str]:
    """Those that are no folder of another: what lies in a link would be planted outside."""
    return [p for p in paths if not any(other.startswith(f"{p}/") for other in paths)]


def chosen(known: Unharmed, count: int | None) -> list[tuple[list[str], str]]:
    found = cells(known)
    return found if count is None else random.Random(0).sample(found, min(count, len(found)))
