"""A folder changed at the price of what changes: one beside it is brought up to date, and the two change names.

Readers of the folder see the old state or the new one, whole, at every moment: names are exchanged in one step, and
who has files open keeps what was opened. The second folder stays as the spare, `.NAME.spare`, with what the folder
held before; large files that do not change are one file with two names. The next change then has to write only what
differs, and nothing if it goes back. A spare that is not what its seal says is thrown away and made anew, and so is
a file of it that somebody still has open.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_export import disk, files, sealed
from lora_export.errors import InputError, OutputError

Ranges = Sequence[tuple[int, int]]  # (offset, length)


@dataclass
class Spare:
    """folder: what is in use, and is not touched; place: where its next state is made.

    state: what the caller said of the spare when it was last in use, or None if there is none to be had; proof: the
    file of both by which a state is known, which is written last.
    """

    folder: Path
    place: Path
    proof: str
    state: Mapping[str, Any] | None = None

    @property
    def seal(self) -> Path:
        return self.place.with_name(f"{self.place.name}.json")

    def prepare(self, edited: Mapping[str, Ranges], kept: Iterable[str]) -> None:
        """Have two sorts of files in `place`, nothing else: those to be changed in some ranges, and those to stay.

        With a state they are as they were then; without, as they are in the folder. What is in the ranges is not
        copied, for it will be written.
        """
        if self.state is None:
            shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(exist_ok=True)
        self.seal.unlink(missing_ok=True)
        (self.place / self.proof).unlink(missing_ok=True)  # from now on it is no state of anything
        disk.sync(self.place)
        names = {*edited, *kept} - {self.proof}
        for path in [p for p in self.place.iterdir() if p.name not in names]:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for name in sorted(names):
            source, target = self.folder / name, self.place / name
            if target.exists():
                if name not in edited or (target.stat().st_nlink == 1 and nobody_reads(target)):
                    continue
                source = target.rename(target.with_name(f"{name}.old"))
            if source.is_symlink() or not source.is_file():
                raise InputError("this is no plain file", where=source, expected="plain files alone")
            if name in edited:
                _copy_around(source, target, edited[name])
            else:
                os.link(source, target)
            if source.parent == self.place:
                source.unlink()


@contextlib.contextmanager
def exchanged(folder: Path, proof: str, keep: bool, state: Mapping[str, Any]) -> Iterator[Spare]:
    """Yield the spare of a folder; afterwards the two have changed names, and what was in use is the spare.

    state: what the folder holds now, for the spare that it becomes; keep: whether it is to stay. On any error the
    folder is as it was. OutputError where a folder cannot be exchanged, or another process is at it.
    """
    folder = folder.absolute()
    if folder.is_symlink() or not folder.is_dir() or folder.is_mount():
        raise OutputError("this is no folder whose name could be given to another", where=folder)
    place = folder.with_name(f".{folder.name}.spare")
    with files.only_writer(folder) as interrupts:
        spare = Spare(folder, place, proof)
        spare.state = _trusted(spare)
        with interrupts.welcome():
            yield spare
            disk.sync_tree(spare.place)
        before = sealed.sha256(folder / proof)
        files.exchange(spare.place, folder)
        disk.sync(folder.parent)
        if keep:
            sealed.write_sealed(spare.seal, {"proof": proof, "sha256": before, "state": dict(state)})
        else:
            shutil.rmtree(spare.place)
            spare.seal.unlink(missing_ok=True)


def _trusted(spare: Spare) -> Mapping[str, Any] | None:
    """The state that the spare was sealed with, if it is still that, and nobody reads its files."""
    proof = spare.place / spare.proof
    if not (spare.seal.is_file() and proof.is_file() and spare.place.is_dir()) or spare.place.is_symlink():
        return None
    try:
        known = sealed.read_sealed(spare.seal)
    except InputError:
        return None
    state = known.get("state")
    written = proof.stat().st_mtime_ns
    if any(p.is_symlink() or (p.is_file() and p.stat().st_mtime_ns > written) for p in spare.place.rglob("*")):
        return None
    if known.get("sha256") != sealed.sha256(proof) or not isinstance(state, dict):
        return None
    return state


def nobody_reads(path: Path) -> bool:
    """Whether no other process has the file open or mapped; False where the system cannot tell."""
    if not hasattr(fcntl, "F_SETLEASE"):
        return False
    fd = os.open(path, os.O_WRONLY)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def _copy_around(source: Path, target: Path, ranges: Ranges) -> None:
    """Copy a file but for these ranges."""
    size, at = source.stat().st_size, 0
    old, new = os.open(source, os.O_RDONLY), os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.truncate(new, size)
        for start, length in [*sorted(ranges), (size, 0)]:
            if start > at:
                disk.copy_range(old, at, start - at, new, at)
            at = max(at, start + length)
    finally:
        os.close(old)
        os.close(new)
