"""A package as one file, and back: the same files give the same bytes, and unpacking is bounded.

Formats: POSIX.1-2001 pax (the tar of a .tar.zst), PKWARE's APPNOTE 6.3 (zip).
"""

import tarfile
import unicodedata
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copyfileobj
from typing import IO, Any

from lora_export.choices import ARCHIVES
from lora_export.errors import InputError
from lora_export.storage import disk, sealed

MOST_FILES = 10_000
DEEPEST = 16  # folders above a file
LONGEST_PATH = 1024  # bytes
# Bytes that an archive may expand to: per byte of its own, and in addition. Weights hardly shrink; tokenizers to a
# fifth.
EXPANSION, ALLOWANCE = 100, 64 * 2**20
LARGEST_WINDOW = 2**26  # bytes that zstd may look back; `zstd -19` needs 2**23
LARGEST_EXTENDED = 2**16  # bytes of a pax header
LARGEST_READ = 2**22  # bytes at once, and so of a zip's directory: far more than MOST_FILES need
_BLOCK = 2**20
_SECTOR = tarfile.BLOCKSIZE
_ENCRYPTED = 0x1
_LOCAL_HEADER = 30  # bytes, without the name
# Fields of a pax header that are ignored; nothing here depends on them.
_IGNORED = frozenset({b"mtime", b"atime", b"ctime", b"uid", b"gid", b"uname", b"gname", b"comment"})
_EARLIEST = (1980, 1, 1, 0, 0, 0)  # time that a zip can state
_MODE = 0o644
_LEVEL = 3  # of zstd; weights hardly shrink, and higher levels only take longer


def kind_of(path: Path) -> str | None:
    """The format according to a file's name; None if it is not an archive."""
    return next((kind for kind in ARCHIVES if path.name.endswith(f".{kind}")), None)


def named(path: Path, kind: str) -> Path:
    """`path` with the suffix of this format."""
    return path if path.name.endswith(f".{kind}") else path.with_name(f"{path.name}.{kind}")


def write(folder: Path, target: Path, kind: str) -> None:
    """Every file below `folder`, sorted by name, without this machine's times, owners and modes."""
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
                copyfileobj(source, sink, _BLOCK)


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


# --- unpacking ---------------------------------------------------------------------------------------------


def extract(archive: Path, folder: Path) -> None:
    """Unpack into the empty `folder`.

    InputError for a damaged archive, for a name that leads out of the folder or occurs twice, for anything but a
    regular file, and for an archive that would grow beyond its bounds; OutputError if the disk lacks space.
    """
    try:
        bounds = Bounds(EXPANSION * archive.stat().st_size + ALLOWANCE)
        if kind_of(archive) == "zip":
            _unzip(archive, folder, bounds)
        else:
            _untar(archive, folder, bounds)
    except (
        OSError,
        EOFError,
        ValueError,
        OverflowError,
        NotImplementedError,
        zipfile.BadZipFile,
    ) as error:
        raise _damaged(archive, error) from None
    except Exception as error:  # of zlib or zstandard, which have no common base class
        if type(error).__name__ not in ("ZstdError", "error"):
            raise
        raise _damaged(archive, error) from None


def _damaged(archive: Path, error: Exception) -> InputError:
    return InputError(
        f"the archive cannot be read: {error}",
        where=archive,
        expected="a .tar.zst or .zip that lora-export package wrote",
        next_step="copy it again from where it was made",
    )


@dataclass
class Bounds:
    """bytes_left: that the archive may still expand to; names, folders: so far, in the form in which any file
    system tells them apart."""

    bytes_left: int
    files: int = 0
    names: set[str] = field(default_factory=set)
    folders: set[str] = field(default_factory=set)

    def admit(self, name: str, size: int) -> None:
        """Count a file. ValueError, with the reason, if it is not allowed."""
        self.files += 1
        if self.files > MOST_FILES:
            raise ValueError(f"it holds more than {MOST_FILES:,} files")
        long = len(name.encode("utf-8", "replace")) > LONGEST_PATH or name.count("/") > DEEPEST
        if long or not sealed.plain_path(name):
            raise ValueError(f"it holds {name!r}, which would lie outside the package or too deep in it")
        self.spend(size, name)
        plain = unicodedata.normalize("NFC", name).casefold()
        above = ["/".join(plain.split("/")[:i]) for i in range(1, plain.count("/") + 1)]
        if plain in self.names or plain in self.folders or not self.names.isdisjoint(above):
            raise ValueError(f"it holds {name!r} twice, or another name that some file systems treat as the same")
        self.names.add(plain)
        self.folders.update(above)
        if len(self.folders) > MOST_FILES:
            raise ValueError(f"it holds more than {MOST_FILES:,} folders")

    def spend(self, size: int, name: str) -> None:
        self.bytes_left -= size
        if self.bytes_left < 0:
            raise ValueError(f"with {name!r} it would expand to more than {EXPANSION} times its size")


def _write(folder: Path, name: str, source: Iterator[bytes]) -> None:
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as out:
        for block in source:
            out.write(block)


# --- zip ---------------------------------------------------------------------------------------------------


class _BoundedFile:
    """A file that limits each read: zipfile reads a directory of any size at once."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell, self.seekable, self.close = file.seek, file.tell, file.seekable, file.close

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(size if 0 <= size <= LARGEST_READ else LARGEST_READ + 1)
        if len(content) > LARGEST_READ:
            raise ValueError("its directory is too large")
        return content


def _unzip(archive: Path, folder: Path, bounds: Bounds) -> None:
    with archive.open("rb") as raw, zipfile.ZipFile(_BoundedFile(raw)) as packed:
        entries = packed.infolist()
        for info in entries:
            if info.orig_filename != info.filename:
                raise ValueError(f"it holds {info.orig_filename!r}, which is not a file name")
            bounds.admit(info.filename, info.file_size)
            _check_entry(info)
        _refuse_overlaps(entries, packed.start_dir)
        disk.check_space(folder, sum(info.file_size for info in entries))
        for info in entries:
            with packed.open(info) as source:
                _write(folder, info.filename, iter(lambda s=source: s.read(_BLOCK), b""))  # type: ignore[misc]


def _check_entry(info: zipfile.ZipInfo) -> None:
    if info.is_dir() or (info.external_attr >> 16) & 0o170000 not in (0, 0o100000):
        raise ValueError(f"{info.filename!r} is not a file")
    if info.flag_bits & _ENCRYPTED:
        raise ValueError(f"{info.filename!r} is encrypted")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{info.filename!r} is compressed with method {info.compress_type}")
    if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
        raise ValueError(f"{info.filename!r} has two sizes")


def _refuse_overlaps(entries: list[zipfile.ZipInfo], end: int) -> None:
    """ValueError for a file whose packed bytes belong to another file, too."""
    for info in sorted(entries, key=lambda i: i.header_offset, reverse=True):
        if info.header_offset < 0 or info.header_offset + _LOCAL_HEADER + info.compress_size > end:
            raise ValueError(f"the bytes of {info.filename!r} also belong to another file")
        end = info.header_offset


# --- tar.zst -----------------------------------------------------------------------------------------------


def _untar(archive: Path, folder: Path, bounds: Bounds) -> None:
    with _unpacked(archive) as packed:
        stream = _Stream(packed, bounds)
        for name, size in _members(stream):
            bounds.admit(name, size)
            disk.check_space(folder, size)
            _write(folder, name, stream.blocks(size))
            stream.take(-size % _SECTOR)
        while stream.some(_BLOCK):  # to the end, where the checksum is
            pass


@contextmanager
def _unpacked(archive: Path) -> Iterator[Any]:
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
    with archive.open("rb") as raw, decompressor.stream_reader(raw) as packed:
        yield packed


@dataclass
class _Stream:
    """The bytes of a tar. Those outside files count as well."""

    packed: Any
    bounds: Bounds

    def blocks(self, size: int) -> Iterator[bytes]:
        """The next bytes, in blocks. EOFError if there are fewer."""
        while size:
            block: bytes = self.packed.read(min(size, _BLOCK))
            if not block:
                raise EOFError("it is truncated")
            size -= len(block)
            yield block

    def take(self, size: int) -> bytes:
        self.bounds.spend(size, "a header")
        return b"".join(self.blocks(size))

    def some(self, most: int) -> bytes:
        block: bytes = self.packed.read(most)
        self.bounds.spend(len(block), "what follows the last file")
        return block


def _members(stream: _Stream) -> Iterator[tuple[str, int]]:
    """Name and size of each file; its bytes come next in the stream. ValueError for anything but a file."""
    fields: dict[bytes, bytes] = {}
    while True:
        block = stream.take(_SECTOR)
        if not block.strip(b"\0"):
            return
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.TarError as error:
            raise ValueError(str(error)) from None
        if member.type == tarfile.XHDTYPE and not fields:
            fields = _extended(stream, member.size)
            continue
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise ValueError(f"{member.name!r} is not a file")
        name = fields[b"path"].decode("utf-8") if b"path" in fields else member.name
        size = _number(fields[b"size"]) if b"size" in fields else member.size
        if size < 0:
            raise ValueError(f"{name!r} has a negative size")
        fields = {}
        yield name, size


def _extended(stream: _Stream, size: int) -> dict[bytes, bytes]:
    """The records of a pax header, "length key=value\n" each, with the length of the whole record."""
    if not 0 < size <= LARGEST_EXTENDED:
        raise ValueError(f"a header of {size} bytes")
    content, at, fields = stream.take(size), 0, dict[bytes, bytes]()
    stream.take(-size % _SECTOR)
    while at < size:
        length, _, _ = content[at : at + 8].partition(b" ")
        end = at + _number(length)
        key, equals, value = content[at + len(length) + 1 : end - 1].partition(b"=")
        if not equals or end > size or content[end - 1 : end] != b"\n" or key in fields:
            raise ValueError("a header is not that of a tar")
        if key not in (b"path", b"size") and key not in _IGNORED:
            raise ValueError(f"a header with {key.decode('utf-8', 'replace')!r}, which no regular file has")
        fields[key], at = value, end
    return fields


def _number(text: bytes) -> int:
    if not (text.isdigit() and len(text) < 19):
        raise ValueError(f"the number {text[:40]!r} in a header")
    return int(text)
