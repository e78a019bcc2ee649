"""Inside a worker: how its process starts, and how it takes up a task.

Light: torch and all else that is heavy is imported by the work itself, inside a task that a timeout watches.
"""

import contextlib
import faulthandler
import importlib
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from lora_export.contracts.fleet import RowOutcome, Task
from lora_export.errors import LoraExportError
from lora_export.fleet.engines.protocol import Work
from lora_export.fleet.scratch import claimed_folder
from lora_export.storage.disk import emptied

LOG = "log.txt"
_LOOK = 1.0  # seconds between two looks at the parent
_SENTRY = 5.0  # seconds that the sentry has to end this process
_THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "RAYON_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
}


@dataclass(frozen=True)
class Start:
    """How a worker starts. parent: the process without which it ends, 0 for none; cores: those that it may use, ()
    for all; threads: of each library; scratch: folder of the node; name: of the slot, in the names of its
    workers' folders; quiet: what libraries print goes to a file LOG in the worker's folder.
    """

    parent: int
    cores: Sequence[int]
    threads: int
    scratch: Path
    name: str
    quiet: bool = True


@dataclass(frozen=True)
class Answer:
    """What a worker sends back: an outcome, or the exception of the work in words, and where in the code it arose.
    rss: bytes of the process after the task."""

    outcome: RowOutcome | None
    error: str = ""
    where: str = ""
    rss: int = 0


def start(settings: Start) -> None:
    """Set this process up, once, before anything heavy is imported."""
    with contextlib.suppress(PermissionError):  # a group of its own already
        os.setsid()  # Ctrl-C in the driver's terminal is the driver's; what the work starts can be ended as a whole
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if settings.parent:
        _end_with(settings.parent)
    home = _own_folder(settings.scratch, settings.name)
    if settings.quiet:
        _into(home / LOG)
    faulthandler.enable(all_threads=False)  # where it was at a crash: the last lines of the log
    share(settings.threads, settings.cores)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


def share(threads: int, cores: Sequence[int] = ()) -> None:
    """Have the libraries of this process use so many threads, and these cores. ONNX Runtime goes by the cores."""
    for name in _THREADS:
        given = os.environ.get(name, "")
        os.environ[name] = str(min(int(given), threads) if given.isdigit() and int(given) else threads)
    if cores and hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):  # a container may have lost them meanwhile
            os.sched_setaffinity(0, cores)


def perform(work: str, task: Task) -> Answer:
    """Do a task with the function MODULE:NAME, in a new folder below the task's scratch that goes with it."""
    try:
        module, _, name = work.partition(":")
        function = cast(Work, getattr(importlib.import_module(module), name))
        with task_folder(task) as folder:
            outcome: object = function(replace(task, scratch=folder))
        if not isinstance(outcome, RowOutcome):
            raise TypeError(f"{work} returned {type(outcome).__name__}, not RowOutcome")
        return Answer(outcome, rss=_resident())
    except BaseException as error:  # plain text: an exception that cannot be pickled would take the pool with it
        frames = traceback.extract_tb(error.__traceback__)[1:]
        return Answer(None, _in_words(error), " < ".join(f"{f.filename}:{f.lineno}" for f in frames[:-5:-1]))


def _in_words(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "not enough memory"
    if isinstance(error, LoraExportError):
        return error.found
    if isinstance(error, OSError):
        return f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
    return f"internal error, please report it: {type(error).__name__}: {error}"


_home: Path | None = None  # the folder of this process, locked as long as it lives


def _own_folder(scratch: Path, name: str) -> Path:
    """The folder of this process; libraries' temporary files go there, too."""
    global _home
    if _home is None or not _home.is_dir():
        scratch.mkdir(parents=True, exist_ok=True)
        _home = claimed_folder(scratch, f"{name}-{os.getpid()}")
        (_home / "tmp").mkdir()
        os.environ["TMPDIR"] = tempfile.tempdir = str(_home / "tmp")
    return _home


@contextlib.contextmanager
def task_folder(task: Task) -> Iterator[Path]:
    """A new folder for one task, in this process's own below `task.scratch`; it is removed in the end."""
    folder = Path(tempfile.mkdtemp(prefix="task-", dir=_own_folder(task.scratch, "worker")))
    try:
        yield folder
    finally:
        emptied(folder)


def _resident() -> int:
    """Bytes of this process that are in memory."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _into(log: Path) -> None:
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)


def _end_with(parent: int) -> None:
    """Have this process end some time after its parent. The sentry is faster, and knows what this has started: the
    kernel's own signal (PR_SET_PDEATHSIG) would leave that without anybody who knows it."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK)
        time.sleep(_SENTRY)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="parent").start()
