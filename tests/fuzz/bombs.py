"""Small things that ask for much: documents with one place blown up, and archives with headers that lie."""

import io
import json
import tarfile
import warnings
import zipfile
from collections.abc import Sequence
from typing import Any

import zstandard
from hypothesis import strategies as st

from tests.fuzz.strategies import ODD_TEXTS, _copy, _slots, damaged_bytes

MARK = "\ue000"
SIZES = [2_000, 50_000, 400_000, 2_000_000]  # bytes that a place is blown up to
UNITS = [
    "[]", "{}", "0", "1", "-1", "9" * 18, "1.5", "1e300", "null", '""', '"a"', '"a.b"', '"\u00e9"', '"\U0001f600"',
    '{"a":0}', "[0]", "[[0]]", '"9"', '"(a+)+b"', '"\\ud800"', '"model.safetensors"',
]  # fmt: skip
STRINGS = ["x", ".", "/", "a.", "a/", "9", "\u00e9", "\U0001f600", "\\n", "\\u0041", "(", ".*", "a?", "[^"]


@st.composite
def bombs(draw: st.DrawFn, valid: Any, keys: Sequence[str] = ()) -> bytes:
    """The document with a value repeated, nested, lengthened, or joined by many of its like."""
    tree = _copy(valid)
    holder, key = draw(st.sampled_from(_slots(tree)))
    if keys and isinstance(holder, dict) and draw(st.integers(0, 3)) == 0:
        key = draw(st.sampled_from(keys))
    known = json.dumps(holder[key]) if not isinstance(holder, dict) or key in holder else "0"
    size = draw(st.sampled_from(SIZES))
    unit = draw(st.sampled_from([*UNITS, known, known, known]))
    count = max(1, size // (len(unit) + 8))
    what = draw(st.sampled_from(["list", "object", "deep", "digits", "text", "beside", "beside", "pairs"]))
    if what == "beside" and isinstance(holder, dict):
        holder[MARK] = 0
        text = json.dumps(tree, ensure_ascii=False)
        large = ",".join(f'"{key}{i}":{unit}' for i in range(count))
        return text.replace(f'"{MARK}": 0', large).encode("utf-8", "replace")
    holder[key] = MARK
    text = json.dumps(tree, ensure_ascii=False)
    large = {
        "list": lambda: f"[{','.join([unit] * count)}]",
        "object": lambda: "{" + ",".join(f'"{i}":{unit}' for i in range(count)) + "}",
        "deep": lambda: "[" * (size // 2) + "]" * (size // 2),
        "digits": lambda: "9" * size,
        "pairs": lambda: "[" + ",".join([f"[{unit},{unit}]"] * (count // 2 + 1)) + "]",
    }.get(what, lambda: '"' + draw(st.sampled_from(STRINGS)) * size + '"')()
    return text.replace(f'"{MARK}"', large).encode("utf-8", "replace")


# --- archives ----------------------------------------------------------------------------------------------

NAMES = st.sampled_from(
    ["a", "b", "A", "a/b", "a/b/c", "manifest.json", "onnx/model.onnx", "\u00e9", "e\u0301", "x" * 99,
     "d/" * 20 + "f",
     *(t for t in ODD_TEXTS if "\ud800" not in t and len(t) < 400)]
)  # fmt: skip
TYPES = st.sampled_from([*([tarfile.REGTYPE] * 6), tarfile.AREGTYPE, *(bytes([c]) for c in b"123456789KLSVXxgDMN")])
LENGTHS = st.sampled_from([0, 0, 1, 10, 512, 513, 100_000, 2**20])


@st.composite
def tar_members(draw: st.DrawFn) -> bytes:
    """One to some members; what the header says of the size may be another thing than what follows."""
    blocks = []
    for _ in range(draw(st.integers(1, 4))):
        info = tarfile.TarInfo(draw(NAMES).replace("\0", "") or "n")
        info.type, length = draw(TYPES), draw(LENGTHS)
        info.size = draw(st.sampled_from([length, length, length, length + 1, 0, 2**33 - 1, 2**62]))
        content = draw(st.sampled_from([b"\0", b"x", _records(draw)]))
        data = content * max(1, length // len(content))
        if draw(st.booleans()):
            info.size = min(info.size, len(data)) if info.type == b"x" else len(data)
        header = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
        block = header + data + bytes(-len(data) % 512)
        blocks.append(block * min(draw(st.sampled_from([1, 1, 1, 2, 200, 12_000])), 2**22 // len(block)))
    return b"".join(blocks)


def _records(draw: st.DrawFn) -> bytes:
    key = draw(st.sampled_from(["path", "size", "mtime", "GNU.sparse.realsize", "linkpath", "hdrcharset", "x"]))
    value = draw(st.sampled_from(["a", "../a", "0", "5", "9" * 30, "9" * 5000, "\0", "", "a/" * 300, "b\nc"]))
    body = f" {key}={value}\n"
    length = draw(st.sampled_from([len(body) + 2, len(body) + 3, 0, 1, 10**8]))
    return f"{length}{body}".encode()


@st.composite
def tar_archives(draw: st.DrawFn) -> bytes:
    raw = draw(tar_members()) + bytes(draw(st.sampled_from([0, 512, 1024, 10_240, 2**23])))
    if draw(st.integers(0, 3)) == 0 and len(raw) < 2**16:
        raw = draw(damaged_bytes(raw))
    window = draw(st.sampled_from([10, 20, 24, 27]))
    parameters = zstandard.ZstdCompressionParameters(window_log=window, compression_level=1)
    packed = zstandard.ZstdCompressor(compression_params=parameters).compress(raw)
    return draw(damaged_bytes(packed)) if draw(st.integers(0, 3)) == 0 and len(packed) < 2**16 else packed


@st.composite
def zip_archives(draw: st.DrawFn) -> bytes:
    """Some files by some method, damaged anywhere, half of the time in the directory at the end."""
    raw = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(raw, "w") as out:  # names that stand twice
        for _ in range(draw(st.integers(0, 4))):
            name = draw(NAMES) or "n"
            method = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA]))
            length = 100 if method == zipfile.ZIP_LZMA else draw(LENGTHS)
            for i in range(draw(st.sampled_from([1] * 12 + [2, 2, 2, 300, 300, 11_000]))):
                data = bytes(length) if not i else b""
                out.writestr(zipfile.ZipInfo(f"{name}{i or ''}"), data, method)
    content = raw.getvalue()
    at = content.find(b"PK\1\2") if draw(st.booleans()) else 0
    if draw(st.integers(0, 4)) and len(content) - at < 2**18:
        return content[:at] + draw(damaged_bytes(content[at:]))
    return content
