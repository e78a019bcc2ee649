"""Work of a fleet without models, by the name of the row: what goes well, and every way to go wrong."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lora_export.contracts.fleet import FleetRow, PlannedRow, Record, RowFigures, RowOutcome, State, Task
from lora_export.errors import GateFailed, InputError
from lora_export.fleet.stores import opened

WORK = "tests.fleet.fakes:work"


def planned(name: str, key: str = "", **more: object) -> PlannedRow:
    """name: what the work does, up to a hyphen; after an @, its base."""
    base = name.partition("@")[2] or "base"
    row = FleetRow(name, base, f"models/{base}", (f"adapters/{name}",))
    return PlannedRow(row, key or f"{name.replace('@', '-at-')}-key", **more)  # type: ignore[arg-type]


def task(name: str, scratch: Path, **more: object) -> Task:
    return Task("row", planned(name, **more), "", scratch)  # type: ignore[arg-type]


def work(task: Task) -> RowOutcome:
    """What the row's name says (of a base: its key), and then its object, if there is a root."""
    name = task.planned.base_key if task.kind == "base" else task.planned.row.name
    key = task.planned.base_key if task.kind == "base" else task.planned.key
    folder = task.scratch / "object"
    folder.mkdir()
    (folder / "half").write_bytes(bytes(1000))
    done: State = "done"
    if os.environ.get("FAKES_LOG"):
        with Path(os.environ["FAKES_LOG"]).open("a") as file:
            file.write(f"{task.kind} {name} {key} {os.getpid()}\n")
    try:
        WAYS.get(name.partition("@")[0].partition("-")[0], lambda: None)()
    except GateFailed:
        done = "gate"
    place = "bases" if task.kind == "base" else "failed" if done == "gate" else "objects"
    figures = RowFigures(kl=float("nan") if name.startswith("nan") else 0.5)
    outcome = RowOutcome(
        task.planned.row.name, key, done, task.kind, seconds=0.01, figures=figures, worker=str(os.getpid()),
        place=f"{place}/{key}",
    )  # fmt: skip
    if task.root:
        (folder / "half").rename(folder / "whole")
        (folder / "name").write_text(key)
        if not opened(task.root).publish(folder, f"{place}/{key}", Record(1, key, {}, outcome, {})):
            return replace(outcome, state="skipped")
    return outcome


def segfault() -> None:
    os.kill(os.getpid(), signal.SIGSEGV) if sys.platform == "win32" else ctypes.string_at(0)


def hold_the_lock() -> None:
    """Never return from native code, and never let another thread of Python run."""
    ctypes.PyDLL(None).sleep(1000)


def memory() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
    held = []
    while True:
        held.append(bytes(2**26))


def children() -> None:
    """Two processes that outlive a worker, one in a session of its own; their numbers are in a file."""
    pids = [
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=own).pid
        for own in (False, True)
    ]
    Path(os.environ["FAKES_PIDS"]).write_text(" ".join(map(str, pids)))
    time.sleep(1000)


def gate() -> None:
    raise GateFailed("validation failed")


def once(way: Callable[[], None]) -> Callable[[], None]:
    """Go wrong the first time only."""

    def go() -> None:
        seen = Path(os.environ["FAKES_ONCE"])
        if not seen.exists():
            seen.touch()
            way()

    return go


def refuse() -> None:
    raise InputError("no such adapter")


class Odd(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__("odd")


def odd() -> None:
    raise Odd(1, 2)


def noise() -> None:
    os.write(1, b"native noise\n")
    os.write(2, b"native noise\n")
    sys.stderr.write("noise\n")


WAYS = {
    "exit0": lambda: os._exit(0),
    "exit7": lambda: os._exit(7),
    "segv": segfault,
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "sleep": lambda: time.sleep(1000),
    "lock": hold_the_lock,
    "memory": memory,
    "children": children,
    "refuse": refuse,
    "gate": gate,
    "once": once(lambda: os._exit(9)),
    "short": lambda: time.sleep(float(os.environ.get("FAKES_SECONDS", "0.05"))),
    "odd": odd,
    "noise": noise,
}
