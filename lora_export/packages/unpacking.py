"""A package's archive back into a folder, within bounds of size, count and memory.

Formats: POSIX.1-2001 pax (the tar of a .tar.zst), PKWARE's APPNOTE 6.3 (zip).
"""

import tarfile
import unicodedata
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from lora_export.choices import ARCHIVES
from lora_export.errors import InputError
from lora_export.storage import disk, sealed

MOST_FILES = 10_000
DEEPEST = 16  # folders above a file
LONGEST_NAME = 1024  # bytes
# An archive may hold so many bytes for each of its own, and besides. Weights hardly shrink; tokenizers shrink to a
# fifth.
EXPANSION, ALLOWANCE = 100, 64 * 2**20
LARGEST_WINDOW = 2**26  # bytes that zstd may look back; `zstd -19` needs 2**23
LARGEST_EXTENDED = 2**16  # bytes of a pax header
LARGEST_READ = 2**22  # bytes at once, and so of a zip's directory: far more than MOST_FILES need
_BLOCK = 2**20
_SECTOR = tarfile.BLOCKSIZE
_ENCRYPTED = 0x1
_LOCAL_HEADER = 30  # bytes, without the name
# What a pax header may say besides name and size; nothing here depends on it.
_PASSED_OVER = frozenset({b"mtime", b"atime", b"ctime", b"uid", b"gid", b"uname", b"gname", b"comment"})


def kind_of(path: Path) -> str | None:
    """The format that a file's name says, None for a file that is no archive."""
    return next((kind for kind in ARCHIVES if path.name.endswith(f".{kind}")), None)


def extract(archive: Path, folder: Path) -> None:
    """Unpack into the empty `folder`.

    InputError for a damaged archive, for a name that leads out of the folder or stands twice, for what is no plain
    file, and for one that would grow beyond its bounds; OutputError where the disk lacks room.
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
    except Exception as error:  # the errors of zlib and zstandard have no base that can be named without them
        if type(error).__name__ not in ("ZstdError", "error"):
            raise
        raise _damaged(archive, error) from None


def _damaged(archive: Path, error: Exception) -> InputError:
    return InputError(
        f"the archive cannot be read: {error}",
        where=archive,
        expected="a .tar.zst or .zip that lora-export package wrote",
        next_step="take it again from where it was made",
    )


@dataclass
class Bounds:
    """bytes_left: that the archive may still give; names: of the files and folders so far, as any system tells them
    apart."""

    bytes_left: int
    files: int = 0
    names: set[str] = field(default_factory=set)
    folders: set[str] = field(default_factory=set)

    def admit(self, name: str, size: int) -> None:
        """Count a file in. ValueError, in words, if it may not be there."""
        self.files += 1
        if self.files > MOST_FILES:
            raise ValueError(f"it holds more than {MOST_FILES:,} files")
        long = len(name.encode("utf-8", "replace")) > LONGEST_NAME or name.count("/") > DEEPEST
        if long or not sealed.plain_path(name):
            raise ValueError(f"it holds {name!r}, which would lie outside the package, or too deep in it")
        self.spend(size, name)
        plain = unicodedata.normalize("NFC", name).casefold()
        above = ["/".join(plain.split("/")[:i]) for i in range(1, plain.count("/") + 1)]
        if plain in self.names or plain in self.folders or not self.names.isdisjoint(above):
            raise ValueError(f"it holds {name!r} twice, or another name that some systems take for it")
        self.names.add(plain)
        self.folders.update(above)
        if len(self.folders) > MOST_FILES:
            raise ValueError(f"it holds more than {MOST_FILES:,} folders")

    def spend(self, size: int, name: str) -> None:
        self.bytes_left -= size
        if self.bytes_left < 0:
            raise ValueError(f"with {name!r} it would become more than {EXPANSION} times as large as it is")


def _write(folder: Path, name: str, source: Iterator[bytes]) -> None:
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as out:
        for block in source:
            out.write(block)


# --- zip ---------------------------------------------------------------------------------------------------


class _Careful:
    """A file that gives little at a time: zipfile reads a directory of any size at once."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell, self.seekable, self.close = file.seek, file.tell, file.seekable, file.close

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(size if 0 <= size <= LARGEST_READ else LARGEST_READ + 1)
        if len(content) > LARGEST_READ:
            raise ValueError("its directory is too large")
        return content


def _unzip(archive: Path, folder: Path, bounds: Bounds) -> None:
    with archive.open("rb") as raw, zipfile.ZipFile(_Careful(raw)) as found:
        entries = found.infolist()
        for info in entries:
            if info.orig_filename != info.filename:
                raise ValueError(f"it holds {info.orig_filename!r}, which is no name")
            bounds.admit(info.filename, info.file_size)
            _check_entry(info)
        _refuse_overlaps(entries, found.start_dir)
        disk.check_space(folder, sum(info.file_size for info in entries))
        for info in entries:
            with found.open(info) as source:
                _write(folder, info.filename, iter(lambda s=source: s.read(_BLOCK), b""))  # type: ignore[misc]


def _check_entry(info: zipfile.ZipInfo) -> None:
    if info.is_dir() or (info.external_attr >> 16) & 0o170000 not in (0, 0o100000):
        raise ValueError(f"{info.filename!r} is no file")
    if info.flag_bits & _ENCRYPTED:
        raise ValueError(f"{info.filename!r} is encrypted")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{info.filename!r} is packed by the method {info.compress_type}")
    if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
        raise ValueError(f"{info.filename!r} has two sizes")


def _refuse_overlaps(entries: list[zipfile.ZipInfo], end: int) -> None:
    """The same packed bytes must not be given for many files."""
    for info in sorted(entries, key=lambda i: i.header_offset, reverse=True):
        if info.header_offset < 0 or info.header_offset + _LOCAL_HEADER + info.compress_size > end:
            raise ValueError(f"the bytes of {info.filename!r} are those of another file, too")
        end = info.header_offset


# --- tar.zst -----------------------------------------------------------------------------------------------


def _untar(archive: Path, folder: Path, bounds: Bounds) -> None:
    with _unpacked(archive) as packed:
        stream = _Stream(packed, bounds)
        for name, size in _members(stream):
            bounds.admit(name, size)
            disk.check_space(folder, size)
            _write(folder, name, stream.blocks(size))
            stream.skip(-size % _SECTOR)
        while stream.some(_BLOCK):  # up to the end, where the checksum is
            pass


@contextmanager
def _unpacked(archive: Path) -> Iterator[Any]:
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
    with archive.open("rb") as raw, decompressor.stream_reader(raw) as packed:
        yield packed


@dataclass
class _Stream:
    """The bytes of a tar; those that are not a file's count, too."""

    packed: Any
    bounds: Bounds

    def blocks(self, size: int) -> Iterator[bytes]:
        """The next bytes, in blocks. EOFError if there are fewer."""
        while size:
            block: bytes = self.packed.read(min(size, _BLOCK))
            if not block:
                raise EOFError("it is cut off")
            size -= len(block)
            yield block

    def take(self, size: int) -> bytes:
        self.bounds.spend(size, "a header")
        return b"".join(self.blocks(size))

    def skip(self, size: int) -> None:
        self.take(size)

    def some(self, most: int) -> bytes:
        block: bytes = self.packed.read(most)
        self.bounds.spend(len(block), "what follows the last file")
        return block


def _members(stream: _Stream) -> Iterator[tuple[str, int]]:
    """Name and size of each file, whose bytes are the next ones of the stream. ValueError for what is no file."""
    said: dict[bytes, bytes] = {}
    while True:
        block = stream.take(_SECTOR)
        if not block.strip(b"\0"):
            return
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.TarError as error:
            raise ValueError(str(error)) from None
        if member.type == tarfile.XHDTYPE and not said:
            said = _extended(stream, member.size)
            continue
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise ValueError(f"{member.name!r} is no file")
        name = said[b"path"].decode("utf-8") if b"path" in said else member.name
        size = _number(said[b"size"]) if b"size" in said else member.size
        if size < 0:
            raise ValueError(f"{name!r} has less than no bytes")
        said = {}
        yield name, size


def _extended(stream: _Stream, size: int) -> dict[bytes, bytes]:
    """The records of a pax header: "length key=value\n", the length that of the whole record."""
    if not 0 < size <= LARGEST_EXTENDED:
        raise ValueError(f"a header of {size} bytes")
    content, at, said = stream.take(size), 0, dict[bytes, bytes]()
    stream.skip(-size % _SECTOR)
    while at < size:
        length, _, _ = content[at : at + 8].partition(b" ")
        end = at + _number(length)
        key, equals, value = content[at + len(length) + 1 : end - 1].partition(b"=")
        if not equals or end > size or content[end - 1 : end] != b"\n" or key in said:
            raise ValueError("a header that is not one of a tar")
        if key not in (b"path", b"size") and key not in _PASSED_OVER:
            raise ValueError(f"a header with {key.decode('utf-8', 'replace')!r}: what follows it is no plain file")
        said[key], at = value, end
    return said


def _number(text: bytes) -> int:
    if not (text.isdigit() and len(text) < 19):
        raise ValueError(f"the number {text[:40]!r} in a header")
    return int(text)
