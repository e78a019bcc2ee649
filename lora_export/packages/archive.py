"""A package in one file: the same files give the same bytes; and back into a folder, with distrust."""

import io
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lora_export import disk, sealed
from lora_export.choices import ARCHIVES
from lora_export.errors import InputError

_EARLIEST = (1980, 1, 1, 0, 0, 0)  # that a zip can say
_MODE = 0o644
_LEVEL = 3  # of zstd; weights hardly shrink, and more levels cost only time
_BLOCK = 2**20


def write(folder: Path, target: Path, kind: str) -> None:
    """All files below `folder`, sorted by name, without times, owners and modes of this machine."""
    paths = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.relative_to(folder).as_posix())
    if kind == "zip":
        _write_zip(folder, paths, target)
    else:
        _write_tar(folder, paths, target)


def _write_zip(folder: Path, paths: list[Path], target: Path) -> None:
    with zipfile.ZipFile(target, "x", zipfile.ZIP_STORED, allowZip64=True) as out:
        for path in paths:
            entry = zipfile.ZipInfo(path.relative_to(folder).as_posix(), _EARLIEST)
            entry.create_system, entry.external_attr = 3, (0o100000 | _MODE) << 16
            entry.file_size = path.stat().st_size
            with path.open("rb") as source, out.open(entry, "w") as sink:
                _copy(source, sink)


def _write_tar(folder: Path, paths: list[Path], target: Path) -> None:
    import zstandard

    with target.open("xb") as raw:
        compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)
        with (
            compressor.stream_writer(raw, closefd=False) as packed,
            tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as out,
        ):
            for path in paths:
                entry = tarfile.TarInfo(path.relative_to(folder).as_posix())
                entry.size, entry.mode = path.stat().st_size, _MODE
                with path.open("rb") as source:
                    out.addfile(entry, source)


def _copy(source: IO[bytes], sink: IO[bytes]) -> None:
    while block := source.read(_BLOCK):
        sink.write(block)


def named(path: Path, kind: str) -> Path:
    """The name of an archive of this format."""
    return path if path.name.endswith(f".{kind}") else path.with_name(f"{path.name}.{kind}")


def kind_of(path: Path) -> str | None:
    """The format that a file's name says, None for a file that is no archive."""
    return next((kind for kind in ARCHIVES if path.name.endswith(f".{kind}")), None)


def extract(archive: Path, folder: Path) -> None:
    """Unpack into the empty `folder`. InputError for a name that leads out of it, a link, or a damaged archive."""
    try:
        for name, size, source in _entries(archive):
            if not sealed.plain_path(name):
                raise InputError(
                    f"the archive holds {name!r}, which would lie outside of the package",
                    where=archive,
                    expected="relative names",
                )
            disk.check_space(folder, size)
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as out:
                _copy(source, out)
    except (OSError, EOFError, ValueError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise _damaged(archive, error) from None
    except Exception as error:  # zstandard's own error has no base that can be named without importing it
        if type(error).__name__ != "ZstdError":
            raise
        raise _damaged(archive, error) from None


def _damaged(archive: Path, error: Exception) -> InputError:
    return InputError(
        f"the archive cannot be read: {error}",
        where=archive,
        expected="a .tar.zst or .zip that lora-export package wrote",
        next_step="take it again from where it was made",
    )


def _entries(archive: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Name, size and bytes of each file. InputError for what is no file."""
    if kind_of(archive) == "zip":
        with zipfile.ZipFile(archive) as found:
            for info in found.infolist():
                if info.is_dir() or (info.external_attr >> 16) & 0o170000 not in (0, 0o100000):
                    raise InputError(f"{info.filename!r} is no file", where=archive, expected="files alone")
                with found.open(info) as source:
                    yield info.filename, info.file_size, source
        return
    with _tar(archive) as stream:
        for member in stream:
            source_or_none = stream.extractfile(member) if member.isreg() else None
            if source_or_none is None:
                raise InputError(f"{member.name!r} is no file", where=archive, expected="files alone")
            yield member.name, member.size, source_or_none


@contextmanager
def _tar(archive: Path) -> Iterator[tarfile.TarFile]:
    import zstandard

    with (
        archive.open("rb") as raw,
        zstandard.ZstdDecompressor().stream_reader(raw) as packed,
        tarfile.open(fileobj=io.BufferedReader(packed), mode="r|") as found,
    ):
        yield found
