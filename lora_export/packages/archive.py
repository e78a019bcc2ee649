"""A package in one file: the same files give the same bytes. unpacking.py makes a folder of it again."""

import tarfile
import zipfile
from pathlib import Path
from typing import IO

from lora_export.packages.unpacking import extract, kind_of

__all__ = ["extract", "kind_of", "named", "write"]

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
