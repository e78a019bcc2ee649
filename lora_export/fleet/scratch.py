"""Scratch of a node: whose folders lie there, what they take, and whether one more task fits.

A worker's folder is locked by the kernel as long as the worker lives, whatever kills it: one that can be locked is
nobody's, and is removed. Process numbers would not tell, as containers that share a disk count their own.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from lora_export.errors import LoraExportError, OutputError
from lora_export.storage.disk import bytes_in, emptied, size_of

PREFIX = "lora-export-fleet-"
_NEW = 60  # seconds that a folder may be without its lock and its name
SHARE = 0.9  # of what is free, where no limit is given


# --- folders of workers --------------------------------------------------------------------------------------


def claimed_folder(scratch: Path, name: str) -> Path:
    """A new folder, locked until this process ends. It gets its name when it is locked: nobody sees it before."""
    hidden = scratch / f".{PREFIX}{secrets.token_hex(16)}"
    hidden.mkdir(0o700)
    fcntl.flock(os.open(hidden, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), fcntl.LOCK_EX)
    return hidden.rename(scratch / f"{PREFIX}{name}-{secrets.token_hex(4)}")


def sweep(scratch: Path) -> int:
    """Remove the folders of workers that are dead; how many."""
    return sum(_removed_if_dead(folder) for folder in _folders(scratch))


def _folders(scratch: Path) -> Iterator[Path]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for entry in os.scandir(scratch):
            hidden = entry.name.startswith("." + PREFIX)
            if not (hidden or entry.name.startswith(PREFIX)) or not entry.is_dir(follow_symlinks=False):
                continue
            with contextlib.suppress(FileNotFoundError):
                if not hidden or time.time() - entry.stat(follow_symlinks=False).st_mtime > _NEW:
                    yield Path(entry.path)


def folders_of(scratch: Path, name: str) -> tuple[Path, ...]:
    """The folders of the workers that were given this name."""
    return tuple(f for f in _folders(scratch) if f.name.startswith(f"{PREFIX}{name}-"))


def _removed_if_dead(folder: Path) -> bool:
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        status = os.fstat(fd)
        if status.st_uid != os.geteuid() or not stat.S_ISDIR(status.st_mode):
            return False
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        emptied(folder)
        return True
    except OSError:  # somebody holds it
        return False
    finally:
        os.close(fd)


# --- the budget ------------------------------------------------------------------------------------------------


class Budget:
    """Bytes that the tasks of one node may have in scratch at once.

    folder: on this machine, None where the node is another one, whose disk cannot be measured from here; limit:
    None for a share of what is free in `folder`; names: slot → name of its workers' folders.
    """

    def __init__(self, folder: Path | None, limit: int | None, names: Mapping[int, str]) -> None:
        self.folder, self._names = folder, names
        if limit is None and folder is not None:
            limit = int(SHARE * shutil.disk_usage(_existing(folder)).free)
        self.limit = limit
        self._planned: dict[int, int] = {}

    def refusal(self, nbytes: int) -> LoraExportError | None:
        """Why a task can never run here, or None."""
        if self.limit is None or nbytes <= self.limit:
            return None
        return OutputError(
            f"this row needs {size_of(nbytes)} of scratch at once, and {size_of(self.limit)} may be used",
            where=self.folder,
            expected="room for one row",
            next_step="give it more with --disk, or another disk with --scratch",
        )

    def admit(self, slot: int, nbytes: int) -> bool:
        """Count a task in, if there is room for it. One task alone always runs."""
        if self.limit is not None and self._planned and self.used(but=slot) + nbytes > self.limit:
            return False
        self._planned[slot] = nbytes
        return True

    def release(self, slot: int) -> None:
        self._planned.pop(slot, None)

    def used(self, but: int = -1) -> int:
        """Bytes of all slots but one: what was planned for a running task, or what its worker holds, if that is
        more; and the bases that workers of this node share."""
        slots = {*self._names, *self._planned} - {but}
        shared = bytes_in(folders_of(self.folder, "base")) if self.folder is not None else 0
        return shared + sum(max(self._planned.get(slot, 0), self.held(slot)) for slot in slots)

    def held(self, slot: int) -> int:
        """Bytes in the folders of a slot's workers."""
        name = self._names.get(slot)
        return bytes_in(folders_of(self.folder, name)) if name and self.folder is not None else 0


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder
