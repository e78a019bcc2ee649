"""Work of a fleet without models, by the name of the row: what goes well, and every way to go wrong."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from lora_export.contracts.fleet import FleetRow, PlannedRow, RowFigures, RowOutcome, Task
from lora_export.errors import InputError

WORK = "tests.fleet.fakes:work"


def planned(name: str, key: str = "", **more: object) -> PlannedRow:
    row = FleetRow(name, "base", "models/base", (f"adapters/{name}",))
    return PlannedRow(row, key or f"{name}-key", **more)  # type: ignore[arg-type]


def task(name: str, scratch: Path, **more: object) -> Task:
    return Task("row", planned(name, **more), "", scratch)


def work(task: Task) -> RowOutcome:
    """What the row's name says, up to a hyphen."""
    row = task.planned
    name = row.row.name
    (task.scratch / "half").write_bytes(bytes(1000))
    WAYS.get(name.partition("-")[0], lambda: None)()
    figures = RowFigures(kl=float("nan") if name.startswith("nan") else 0.5)
    return RowOutcome(name, row.key, "done", seconds=0.01, figures=figures, worker=str(os.getpid()))


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
    "odd": odd,
    "noise": noise,
}
