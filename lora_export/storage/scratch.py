"""What a run creates beside its output, and how it is cleaned up after a killed run.

Anybody who can write beside an output can plant something there under a predictable name. So a scratch folder has a
random name and is always new. Of what a killed run left, only two things are touched: a real folder of this user,
and, to become the output again, the very folder that was noted before it was moved.
"""

import contextlib
import os
import re
import secrets
import shutil
import stat
from pathlib import Path


def path_for(final: Path, kind: str = "partial") -> Path:
    """A new random name beside `final`."""
    return final.with_name(f".{final.name}.{kind}-{secrets.token_hex(16)}")


def clean(final: Path) -> None:
    """Remove what a killed run left, and put back an output that it had moved. Call it under the lock."""
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
    """Note that the folder `final` has the name `old` for a moment."""
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
    """The folder that was the output when a run was killed, if it is the noted one."""
    try:
        fd = os.open(_note(final), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(fd, encoding="utf-8", errors="replace") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or status.st_uid != os.geteuid():
            return None
        name, identity, *_ = [*file.read(1000).split("\n"), "", ""]
    if not re.fullmatch(rf"\.{re.escape(final.name)}\.old-[0-9a-f]{{32}}", name):
        return None
    old = final.with_name(name)
    return old if os.path.lexists(old) and _identity(old) == identity else None


def _identity(path: Path) -> str:
    status = path.lstat()
    return f"{status.st_dev}:{status.st_ino}"


def _own_folder(path: Path) -> bool:
    """Whether this is a real folder, not a link, of the user that runs this process."""
    status = path.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not path.is_mount()
