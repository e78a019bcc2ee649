"""Output folders and files, written all or nothing: the one implementation for every command.

1. Refuse an output that exists (unless --force is given), that lies inside an input, or that contains one.
2. Take the lock beside it (locks.py), and clean up what a killed run left (scratch.py).
3. Write into a hidden folder beside it, under a random name. Ctrl-C and SIGTERM act at once here (interrupts.py).
4. Sync every file, then rename the folder to the output. An older output changes places with it in one step, and is
   removed last. Signals wait meanwhile.

At any moment the output is the old one or the new one, as a whole. A result that fails a gate becomes OUT.failed.
"""

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from lora_export.errors import GateFailed, OutputError
from lora_export.storage import disk, scratch
from lora_export.storage.interrupts import Interrupts
from lora_export.storage.locks import locked

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextlib.contextmanager
def output_folder(final: Path, force: bool, *, inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """Yield a hidden sibling of `final`; on success it is synced and renamed to `final`, else it is removed.

    A GateFailed inside moves it to `final.failed` instead, with the reason in a file FAILED. `final` may exist only
    if it is empty or `force` is given; it may neither contain nor lie inside any of `inputs`.
    """
    final = final.resolve() if final.name in ("", "..") else final.absolute()
    _check_target(final, force, inputs)
    with Interrupts() as interrupts, _reporting_full_disk(final), _parents(final), locked(final):
        with interrupts.welcome():
            scratch.clean(final)
        _check_target(final, force, inputs)  # again: another run may have written it, or a leftover was put back
        stage = scratch.path_for(final)
        try:
            stage.mkdir()
            with interrupts.welcome(), _reporting_full_disk(final, stage):
                yield stage
                disk.sync_tree(stage)
            replace_folder(stage, final)
        except GateFailed as failure:
            (stage / "FAILED").write_text(failure.message() + "\n", encoding="utf-8")
            disk.sync_tree(stage)
            replace_folder(stage, failed_folder(final))
            raise
        finally:
            shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def output_file(final: Path, force: bool, *, inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """Yield a hidden folder beside `final`; on success the file of that name in it is synced and becomes `final`.

    `final` may exist only if `force` is given, and may not lie inside any of `inputs`.
    """
    final = final.absolute()
    if final.is_dir() or final.is_symlink():
        raise OutputError("the output path is a folder or a link", where=final, expected="a file, or nothing")
    if any(_inside(final.parent.resolve(), source) for source in inputs):
        raise OutputError("the output lies inside an input", where=final, expected="another folder for it")
    if final.exists() and not force:
        raise OutputError(
            "the output exists",
            where=final,
            expected="a file that does not exist yet",
            next_step="add --force to replace it, or choose another -o",
        )
    with Interrupts() as interrupts, _reporting_full_disk(final), _parents(final), locked(final):
        work = scratch.path_for(final)
        try:
            with interrupts.welcome(), _reporting_full_disk(final, work):
                scratch.clean(final)
                work.mkdir()
                yield work
                disk.sync(work / final.name)
            (work / final.name).replace(final)
            disk.sync(final.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def added_to(folder: Path) -> Iterator[None]:
    """Be the only writer of a folder that others may be reading: files are completed first, and then renamed."""
    with Interrupts() as interrupts, _reporting_full_disk(folder), locked(folder.absolute()):
        with interrupts.welcome():
            yield
        disk.sync(folder)


def failed_folder(final: Path) -> Path:
    """Where an output that failed a gate is kept."""
    return final.with_name(final.name + ".failed")


def _check_target(final: Path, force: bool, inputs: Sequence[Path]) -> None:
    for source in inputs:
        if _inside(final.resolve(), source) or any(_inside(p, final) for p in _real_paths(source)):
            raise OutputError(
                "the output lies inside an input or contains one, so writing it would change the input",
                where=final,
                expected=f"an output folder outside {source}",
                next_step="choose another folder with -o",
            )
    if final.is_symlink() or (final.exists() and not final.is_dir()):
        raise OutputError("the output path is a file or a link", where=final, expected="a folder, or nothing")
    if final.is_mount():
        raise OutputError(
            "the output folder is a mount point, which cannot be replaced as a whole",
            where=final,
            expected="a folder below it",
            next_step=f"-o {final / 'merged'}",
        )
    if final.is_dir() and any(final.iterdir()) and not force:
        raise OutputError(
            "the output folder exists and is not empty",
            where=final,
            expected="a folder that does not exist yet",
            next_step="add --force to replace it as a whole, or choose another -o",
        )


def _inside(path: Path, folder: Path) -> bool:
    """Whether `path` is `folder` or lies below it. By inodes: a folder can have several names."""
    return folder.exists() and any(p.exists() and p.samefile(folder) for p in (path, *path.parents))


def _real_paths(source: Path) -> list[Path]:
    """Where an input really lies: in a Hub cache its files are links to blobs elsewhere."""
    links = [p for p in source.iterdir() if p.is_symlink()] if source.is_dir() else []
    return [p.resolve() for p in (source, *links)]


@contextlib.contextmanager
def _parents(final: Path) -> Iterator[None]:
    """Make the folders above `final`, and remove them again if it is not created."""
    missing = [p for p in final.parents if not p.exists()]
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        if not final.exists():
            for folder in missing:
                with contextlib.suppress(OSError):  # not empty: in use by somebody else
                    folder.rmdir()


@contextlib.contextmanager
def _reporting_full_disk(final: Path, stage: Path | None = None) -> Iterator[None]:
    """OutputError for a full disk, with the number of bytes written. stage: where the output is being written.

    Libraries that write with native code report a full disk only in the text of their errors.
    """
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        number = next((n for n in _FULL if _is_of(error, n)), None)
        if number is None:
            raise
        sizes = ""
        if stage is not None and stage.is_dir():
            sizes = f"more than {disk.size_of(disk.written(stage))} are needed, which were already written, and "
        where = getattr(error, "filename2", None) or getattr(error, "filename", None) or final
        raise OutputError(
            f"{os.strerror(number)}: the disk became full while the output was being written",
            where=where,
            expected=f"enough space for the whole output: {sizes}{disk.size_of(_free(final))} are free",
            next_step="free some space, or choose another -o, or another TMPDIR if the file lies there",
        ) from None


def _is_of(error: Exception, number: int) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == number
    return os.strerror(number) in str(error)


def _free(final: Path) -> int:
    folder = next(p for p in final.parents if p.exists())
    return shutil.disk_usage(folder).free


def replace_folder(stage: Path, final: Path) -> None:
    """Rename `stage` to `final` in one step, sync, and remove what was there before.

    OSError if the rename or the sync fails; then everything is as it was.
    """
    existed = os.path.lexists(final)
    _rename(stage, final, existed)
    try:
        disk.sync(final.parent)
    except OSError:
        _rename(final, stage, existed)
        raise
    if existed:
        _remove_replaced(stage, final)


def _rename(a: Path, b: Path, swap: bool) -> None:
    """Rename the folder `a` to `b`; with `swap`, an existing `b` becomes `a`."""
    if not swap:
        a.replace(b)
    elif not disk.exchange_names(a, b):
        # Without an atomic exchange `b` does not exist for a moment; after a kill, scratch.clean restores it.
        old = scratch.path_for(b, "old")
        scratch.note(b, old)
        b.rename(old)
        try:
            a.replace(b)
        except BaseException:
            old.rename(b)
            scratch.forget(b)
            raise
        old.rename(a)
        scratch.forget(b)


def _remove_replaced(old: Path, final: Path) -> None:
    try:
        if stat.S_ISDIR(old.lstat().st_mode):
            shutil.rmtree(old)
        else:  # a link is removed, not its target
            old.unlink()
    except OSError as error:
        raise OutputError(
            f"the new output is complete and in place, but what it replaced cannot be removed: {error.strerror}",
            where=error.filename or old,
            expected=f"an older output that may be deleted; {final} is the new one",
            next_step=f"delete {old} yourself",
        ) from None
