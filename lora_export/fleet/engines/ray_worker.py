"""What runs on a node of a Ray cluster: a worker that is kept for many tasks, and what it tells of itself."""

import contextlib
import os
import platform
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_export.contracts.fleet import Task
from lora_export.errors import LoraExportError
from lora_export.fleet.engines import orphans, workers
from lora_export.fleet.scratch import folders_of, sweep
from lora_export.fleet.stores.protocol import opened
from lora_export.version import LIBRARIES, __version__, installed

ROOT_ID = "root-id"  # a file that tells roots apart


@dataclass(frozen=True)
class Meeting:
    """What a driver gives a worker before its first task.

    variables: of the environment, set where the node has none (they travel with this call: Ray logs its runtime
    environments); root, token: what ROOT_ID has to contain there, "" where nothing is compared; needed: files and
    folders that the node has to see; folder: the driver's working folder.
    """

    variables: Mapping[str, str] = field(default_factory=dict, repr=False)
    root: str = ""
    token: str = ""
    needed: tuple[str, ...] = ()
    folder: str = ""


@dataclass(frozen=True)
class Introduction:
    """What a worker tells of itself. node: the name of its machine; root: why the root there is not the driver's,
    "" if it is; missing: what it does not see."""

    node: str
    pid: int
    versions: Mapping[str, str]
    root: str = ""
    missing: tuple[str, ...] = ()


class RayWorker:
    """An actor. Its methods run one at a time, in the main thread of a process of its own."""

    def __init__(self) -> None:
        self._watcher = orphans.Watcher()
        self._started = False

    def begin(self, meeting: Meeting) -> Introduction:
        for name, value in meeting.variables.items():
            os.environ.setdefault(name, value)
        with contextlib.suppress(OSError):  # it has another disk, and sees no relative path either
            os.chdir(meeting.folder)
        missing = tuple(p for p in meeting.needed if not Path(p).exists())
        return Introduction(socket.gethostname(), os.getpid(), versions(), _other_root(meeting), missing)

    def ping(self) -> None:
        """Answers while it is alive."""

    def carry_out(self, work: str, task: Task, place: int) -> workers.Answer:
        """work: MODULE:FUNCTION; place: of this worker among those of its node, which share out the cores."""
        if not self._started:
            sweep(task.scratch)
            name = f"ray-{place}"
            cores = own_cores(task.threads, place)
            workers.start(workers.Start(0, cores, task.threads, task.scratch, name, quiet=False))
            for folder in folders_of(task.scratch, f"{name}-{os.getpid()}"):
                self._watcher.remove(folder)
            self._started = True
        return workers.perform(work, task)


def own_cores(threads: int, place: int) -> tuple[int, ...]:
    """Those of this process's cores that the worker at `place` of its node uses; () if there are not enough."""
    if not hasattr(os, "sched_getaffinity"):
        return ()
    cores = sorted(os.sched_getaffinity(0))[place * threads : (place + 1) * threads]
    return tuple(cores) if len(cores) == threads else ()


def versions() -> dict[str, str]:
    """Of this tool, of Python (major and minor), of Ray and of `LIBRARIES`, as they are here: workers that differ
    would put another's bytes below a key."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"lora-export": __version__, "python": python} | installed(("ray", *LIBRARIES))


def _other_root(meeting: Meeting) -> str:
    """Why what this node has at the root is not the driver's, or cannot be written to; "" if it is."""
    if not meeting.token:
        return ""
    trial = f"probes/{secrets.token_hex(16)}"
    try:
        store = opened(meeting.root)
        found = store.read(ROOT_ID)
        if found != meeting.token.encode():
            return "nothing of it is there" if found is None else "another root is there"
        store.create(f"{trial}/written", b"")
        store.remove(trial)
    except (OSError, LoraExportError) as error:
        return str(error).splitlines()[0]
    return ""
