"""A small process that ends the workers, and all that these have started, when their driver is gone.

It learns of a driver's end, also by kill -9, from the pipe between them. A worker alone could not do this: it may
be in native code that lets no other thread of it run.
"""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from lora_export.fleet.scratch import PREFIX


class Sentry:
    """Knows the workers that are alive, and the scratch that they leave."""

    def __init__(self, scratch: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PROGRAM, str(scratch.absolute() / PREFIX)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            cwd="/", text=True,
        )  # fmt: skip

    def add(self, pid: int) -> None:
        self._say(f"+{pid}")

    def drop(self, pid: int) -> None:
        self._say(f"-{pid}")

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # somebody has ended it: workers look after their parent, too
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)


def end_tree(pid: int, alive: bool) -> None:
    """Kill a worker that is alive with all that it has started, and what is left of the group that it leads."""
    import psutil

    if alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker = psutil.Process(pid)
            worker.suspend()  # so that it starts nothing more
            for process in [*worker.children(recursive=True), worker]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


# Without this package, and without its imports: it starts in 10 ms and takes 8 MB.
_PROGRAM = """
import fcntl, glob, os, shutil, signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
alive = set()
for line in sys.stdin:
    pid = int(line[1:])
    alive.add(pid) if line[0] == "+" else alive.discard(pid)
def parents():
    found = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if name.isdigit():
            try:
                with open("/proc/" + name + "/stat") as file:
                    state, parent = file.read().rpartition(")")[2].split()[:2]
                if state not in "ZX":
                    found[int(name)] = int(parent)
            except (OSError, ValueError):
                pass
    return found
for pid in alive:
    try:
        os.kill(pid, signal.SIGSTOP)
    except OSError:
        pass
doomed, tree, size = set(alive), parents() if alive else {}, -1
while size != len(doomed):
    size = len(doomed)
    doomed |= {pid for pid, parent in tree.items() if parent in doomed}
for kill, pids in ((os.killpg, alive), (os.kill, doomed)):
    for pid in pids:
        try:
            kill(pid, signal.SIGKILL)
        except OSError:
            pass
deadline = time.monotonic() + 10
while alive & set(parents()) and time.monotonic() < deadline:
    time.sleep(0.05)
for folder in glob.glob(glob.escape(sys.argv[1]) + "*") if alive else ():
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        if os.fstat(fd).st_uid == os.geteuid():
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        pass
"""
