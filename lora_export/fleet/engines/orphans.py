"""What a worker started and where it worked go with it, however it ends.

A worker that is killed cannot end its children, and some of them lead sessions of their own (`workflows.confined`).
So a small process stands beside each worker of a cluster. A pipe tells it at once when the worker is gone; until
then it looks at the worker's descendants a few times a second, since the kernel forgets whose children they were.
"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path


class Watcher:
    """The process beside this one. It knows descendants where /proc tells them (Linux); elsewhere they run to their
    own end."""

    def __init__(self) -> None:
        reading, self._writing = os.pipe()  # programs do not inherit it
        os.register_at_fork(after_in_child=self._forget)
        with open(reading, "rb") as pipe:  # noqa: PTH123 -- a descriptor
            subprocess.run(
                [sys.executable, "-I", "-S", "-c", _PROGRAM, str(os.getpid())],
                stdin=pipe, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd="/",
                check=True,
            )  # fmt: skip

    def remove(self, folder: Path) -> None:
        """Have a folder removed when this process is gone."""
        with contextlib.suppress(OSError):  # somebody has ended the watcher
            os.write(self._writing, os.fsencode(folder.absolute()) + b"\0")

    def _forget(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._writing)


# It leaves the worker's children at once, as Ray ends those with a worker.
# A process number is used again: its start time tells whether it is still the same process. What starts between
# two looks and leads a session of its own is found as a child of another that was seen, or not at all.
_PROGRAM = """
import os, select, shutil, signal, sys, time
if os.fork():
    os._exit(0)
worker, seen, told = int(sys.argv[1]), {}, b""
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
def begun(pid):
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[19]
    except (OSError, IndexError):
        return None
def look(pid):
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children") as file:
                for child in map(int, file.read().split()):
                    if child != os.getpid():
                        seen[child] = begun(child)
                        look(child)
    except OSError:
        pass
while True:
    if select.select([0], [], [], 0.25)[0]:
        more = os.read(0, 65536)
        if not more:
            break
        told += more
    look(worker)
    seen = {pid: at for pid, at in seen.items() if at is not None and begun(pid) == at}
for _ in range(3):
    for pid in list(seen):
        look(pid)
    for pid, at in seen.items():
        if at is not None and begun(pid) == at:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
    time.sleep(0.05)
for folder in told.split(b"\\0")[:-1]:
    shutil.rmtree(folder, ignore_errors=True)
"""
