"""What a run makes beside its output: names that nobody can guess, made new, and cleaned up after a killed run.

Whoever can write beside an output can put something there under a name that is expected. So a scratch folder has a
random name and is made, never taken over; and of what a killed run left, only what this rule proves is touched: a
real folder of this user, and, to become the output again, the very folder that was noted before it was moved.
"""

import contextlib
import os
import re
import secrets
import shutil
import stat
from pathlib import Path


def path_for(final: Path, kind: str = "partial") -> Path:
    """A name beside `final` that is not in use and cannot be foreseen."""
    return final.with_name(f".{final.name}.{kind}-{secrets.token_hex(16)}")


def clean(final: Path) -> None:
    """Remove what a killed run left; put back an output that it had moved away. Called under the lock."""
    old = _noted(final)
    if old is not None and _own_folder(old):
        if os.path.lexists(final):
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(final)
    forget(final)
    name = re.compile(rf"\.{re.escape(final.name)}\.partial-[0-9a-f]{{32}}")
    for path in final.parent.iterdir():
        if name.fullmatch(path.name) and _own_folder(path):
            shutil.rmtree(path, ignore_errors=True)


def note(final: Path, old: Path) -> None:
    """Write down that the folder `final` gets the name `old` for a moment."""
    forget(final)
    fd = os.open(_note(final), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, f"{old.name}\n{_identity(final)}\n".encode())
        os.fsync(fd)
    finally:
        os.close(fd)


def forget(final: Path) -> None:
    with contextlib.suppress(FileNotFoundError, IsADirectoryError):
        _note(final).unlink()


def _note(final: Path) -> Path:
    return final.with_name(f".{final.name}.moved")


def _noted(final: Path) -> Path | None:
    """The folder that was the output when a run was killed, if it is the one that was noted."""
    try:
        fd = os.open(_note(final), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(fd, encoding="utf-8", errors="replace") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or found.st_uid != os.geteuid():
            return None
        name, identity, *_ = [*file.read(1000).split("\n"), "", ""]
    if not re.fullmatch(rf"\.{re.escape(final.name)}\.old-[0-9a-f]{{32}}", name):
        return None
    old = final.with_name(name)
    return old if os.path.lexists(old) and _identity(old) == identity else None


def _identity(path: Path) -> str:
    found = path.lstat()
    return f"{found.st_dev}:{found.st_ino}"


def _own_folder(path: Path) -> bool:
    """Whether this is a real folder, no link, of the user that this process runs as."""
    found = path.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not path.is_mount()
