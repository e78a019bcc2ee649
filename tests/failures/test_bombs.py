"""Small files that ask for much: archives, headers, documents and expressions. refused, soon, in little memory."""

import io
import itertools
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import zstandard
from onnx import helper

from lora_export.checkpoint.header import read_header
from lora_export.errors import ExportError, InputError, LoraExportError
from lora_export.onnx_export import check_model
from lora_export.onnx_export.weights import map as weights_map
from lora_export.packages import archive
from lora_export.storage.sealed import read_json, read_sealed, write_sealed
from tests.fuzz.guard import measured

TAR, ZIP = "tar.zst", "zip"

# --- archives ----------------------------------------------------------------------------------------------


def tar(*blocks: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(b"".join(blocks) + bytes(1024))


def member(name: str, data: bytes = b"", **fields: Any) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)


def pax(records: bytes, **fields: Any) -> bytes:
    return member("pax", records, type=tarfile.XHDTYPE, **fields)


def record(key: str, value: str) -> bytes:
    length = len(f" {key}={value}\n".encode())
    digits = next(d for d in range(1, 20) if len(str(length + d)) == d)
    return f"{length + digits} {key}={value}\n".encode()


def zipped(*entries: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", method) as out:
        for name, data in entries:
            out.writestr(zipfile.ZipInfo(name), data, method)
    return raw.getvalue()


def edited(content: bytes, at: int, value: bytes, signature: bytes = b"PK\1\2") -> bytes:
    start = content.index(signature) + at
    return content[:start] + value + content[start + len(value) :]


def overlapping() -> bytes:
    """Two entries of the directory for the same bytes."""
    whole = zipped(("a", b"x" * 100), ("b", b"x" * 100))
    second = whole.rindex(b"PK\1\2")
    return whole[: second + 42] + bytes(4) + whole[second + 46 :]


def sparse() -> bytes:
    info = tarfile.TarInfo("sparse")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 0
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[386:410] = b"00000000000\0" + b"00000000000\0"
    block[483:495] = b"02166000000\0"  # 300 MB
    block[148:156] = f"{sum(block[:148]) + 8 * 32 + sum(block[156:512]):06o}\0 ".encode()
    return tar(bytes(block))


def wide_window() -> bytes:
    parameters = zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=True)
    raw = member("a", bytes(3 * 2**26))
    return zstandard.ZstdCompressor(compression_params=parameters).compress(raw + bytes(1024))


ARCHIVES: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "a pax header of 100 MB": (TAR, lambda: tar(pax(bytes(10**8)), member("a", b"x")), "header of 100000000 b"),
    "a name of 100 MB": (TAR, lambda: tar(member("@", bytes(10**8), type=b"L"), member("a")), "is not a file"),
    "a sparse file": (TAR, sparse, "is not a file"),
    "a sparse file in pax": (
        TAR,
        lambda: tar(pax(record("GNU.sparse.realsize", "300000000")), member("a", b"x")),
        "GNU.sparse.realsize",
    ),
    "a global header": (TAR, lambda: tar(member("g", b"", type=tarfile.XGLTYPE), member("a")), "is not a file"),
    "two headers": (TAR, lambda: tar(pax(record("path", "b")), pax(record("path", "c")), member("a")), "a file"),
    "a path of pax that leads out": (TAR, lambda: tar(pax(record("path", "../b")), member("a")), "outside the"),
    "a size of pax": (TAR, lambda: tar(pax(record("size", "9" * 18)), member("a")), "more than 100 times"),
    "a size of 5,000 digits": (TAR, lambda: tar(pax(record("size", "9" * 5000)), member("a")), "the number"),
    "a length of nothing": (TAR, lambda: tar(pax(b"0 path=b\n"), member("a")), "not that of a tar"),
    "zeros": (TAR, lambda: tar(member("a", bytes(2**28))), "more than 100 times"),
    "zeros behind the end": (TAR, lambda: tar(member("a"), bytes(2**28)), "more than 100 times"),
    "many files": (TAR, lambda: tar(*(member(f"{i}") for i in range(10_001))), "more than 10,000 files"),
    "many folders": (
        TAR,
        lambda: tar(*(member("/".join([f"{i}", *"abcdefgh", "x"])) for i in range(2000))),
        "more than 10,000 folders",
    ),
    "deep folders": (TAR, lambda: tar(member("a/" * 40 + "b")), "too deep"),
    "a name twice": (TAR, lambda: tar(member("a"), member("a")), "twice"),
    "a name in another case": (TAR, lambda: tar(member("a/b"), member("A/B")), "twice"),
    "a name composed otherwise": (
        TAR,
        lambda: tar(pax(record("path", "\u00e9")), member("x"), pax(record("path", "e\u0301")), member("x")),
        "twice",
    ),
    "a file that is a folder, too": (TAR, lambda: tar(member("a"), member("a/b")), "twice"),
    "a window of 128 MB": (TAR, wide_window, "cannot be read"),
    "cut off": (TAR, lambda: zstandard.ZstdCompressor().compress(member("a", b"x" * 600)[:1024]), "truncated"),
    "zeros in a zip": (ZIP, lambda: zipped(("a", bytes(2**28)), method=zipfile.ZIP_DEFLATED), "than 100 times"),
    "files that overlap": (ZIP, overlapping, "another file"),
    "many files in a zip": (ZIP, lambda: zipped(*((f"{i}", b"") for i in range(10_001))), "more than 10,000 files"),
    "an encrypted file": (ZIP, lambda: edited(zipped(("a", b"x")), 8, b"\1\0"), "encrypted"),
    "packed by LZMA": (ZIP, lambda: zipped(("a", b"x"), method=zipfile.ZIP_LZMA), "method 14"),
    "two sizes": (ZIP, lambda: edited(zipped(("a", b"x")), 24, b"\2\0\0\0"), "two sizes"),
    "a zip's name twice": (ZIP, lambda: edited(zipped(("a", b"x"), ("b", b"x")), 46, b"b"), "twice"),
    "an offset beyond the end": (ZIP, lambda: edited(zipped(("a", b"x")), 42, b"\xff\xff\xff\x7f"), "another file"),
    "a large directory": (ZIP, lambda: zipped(*((f"{i:060000}", b"") for i in range(80))), "directory is too"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHIVES)
def test_archive_beyond_bounds_is_refused(name: str, tmp_path: Path) -> None:
    kind, content, said = ARCHIVES[name]
    path = tmp_path / f"p.{kind}"
    path.write_bytes(content())
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=said), measured(path.stat().st_size):
        archive.extract(path, tmp_path / "out")
    assert sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file()) < 2**26


def test_archive_pax_header_applies_to_next_file_only(tmp_path: Path) -> None:
    long = "a" * 90 + "/" + "b" * 90
    content = tar(pax(record("mtime", "1.5") + record("path", long)), member("x", b"1"), member("y", b"2"))
    (tmp_path / "p.tar.zst").write_bytes(content)
    (tmp_path / "out").mkdir()
    archive.extract(tmp_path / "p.tar.zst", tmp_path / "out")
    found = {
        p.relative_to(tmp_path / "out").as_posix(): p.read_bytes()
        for p in (tmp_path / "out").rglob("*")
        if p.is_file()
    }
    assert found == {long: b"1", "y": b"2"}


# --- headers and documents ---------------------------------------------------------------------------------


def header(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


def sizes(count: int, size: str = "9" * 18) -> str:
    return f"[{','.join([size] * count)}]"


HEADERS = {
    "many huge sizes": (f'{{"w":{{"dtype":"U8","shape":{sizes(100_000)},"data_offsets":[0,1]}}}}', "no tensor has"),
    "many sizes of 1": (f'{{"w":{{"dtype":"U8","shape":{sizes(10**6, "1")},"data_offsets":[0,1]}}}}', "no tensor"),
    "sizes beside a zero": ('{"w":{"dtype":"U8","shape":[0,9000000000,9000000000],"data_offsets":[0,0]}}', "no t"),
    "a size of many digits": (f'{{"w":{{"dtype":"U8","shape":[{"9" * 10**6}],"data_offsets":[0,1]}}}}', "digits"),
    "lists in lists": ("[" * 10**6, "not valid JSON"),
    "many empty lists": ('{"w":[' + ",".join(["[]"] * 10**6) + "]}", "brackets"),
    "many empty objects": ('{"w":[' + ",".join(["{}"] * 10**6) + "]}", "brackets"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_header_beyond_bounds_is_refused(name: str, tmp_path: Path) -> None:
    text, said = HEADERS[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(header(text))
    with pytest.raises(LoraExportError, match=said), measured(path.stat().st_size):
        read_header(path)


@pytest.mark.parametrize("shape", [[10**18] * 100_000, [1] * 100, [2**62, 2], [0, 2**62, 2]])
def test_weights_map_shapes_are_bounded(shape: list[int], tmp_path: Path) -> None:
    weight = {"name": "w", "file": "w.bin", "dtype": "float32", "shape": shape, "offset": 0, "made_of": []}
    (tmp_path / weights_map.NAME).write_text(json.dumps({"schema_version": 1, "hashes": {}, "weights": [weight]}))
    size = (tmp_path / weights_map.NAME).stat().st_size
    with pytest.raises(LoraExportError, match="the shape"), measured(size):
        weights_map.read(tmp_path)


@pytest.mark.parametrize("text", ['{"a":[' + "[]," * 10**6 + "[]]}", '{"a":' + "[" * 10**5 + "]" * 10**5 + "}"])
def test_json_with_excessive_structure_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    for read in (read_json, read_sealed):
        with pytest.raises(InputError, match="not valid JSON"), measured(len(text)):
            read(tmp_path / "a.json")


def test_json_beyond_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(InputError, match="more than"), measured(2**20):
        read_json(path, limit=2**20)


def test_sealed_json_with_other_text_is_refused_quickly(tmp_path: Path) -> None:
    write_sealed(tmp_path / "a.json", {"a": [0] * 200_000, "b": "é"})
    content = (tmp_path / "a.json").read_bytes()
    assert read_sealed(tmp_path / "a.json")["b"] == "é"
    for changed in (
        content.replace(b"\n", b"\r\n", 1),
        content[:-1],
        content.replace(b"0", b"1", 1),
        content + b" ",
    ):
        (tmp_path / "a.json").write_bytes(changed)
        with pytest.raises(InputError, match="digest"), measured(len(changed)):
            read_sealed(tmp_path / "a.json")


# --- graphs ------------------------------------------------------------------------------------------------


def calling(depth: int, times: int = 2, first: str = "Neg") -> onnx.ModelProto:
    """A graph of one node: a call of a function that calls another as often, and so on; the last calls `first`."""
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    functions = []
    for i in range(depth):
        called, domain = (f"f{i - 1}", "own") if i else (first, "" if first == "Neg" else "own")
        names = ["a", *(f"t{j}" for j in range(times - 1)), "b"]
        nodes = [helper.make_node(called, [x], [y], domain=domain) for x, y in itertools.pairwise(names)]
        functions.append(helper.make_function("own", f"f{i}", ["a"], ["b"], nodes, imports))
    x, y = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [4]) for n in "xy")
    graph = helper.make_graph([helper.make_node(f"f{depth - 1}", ["x"], ["y"], domain="own")], "g", [x], [y])
    return helper.make_model(graph, opset_imports=imports, ir_version=8, functions=functions)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (calling(30), "more than 1,000,000 nodes"),
        (calling(300, 1), "nested calls"),
        (calling(2, 1, "f1"), "nested calls"),
    ],
    ids=["a billion calls", "deep calls", "a call of itself"],
)
def test_graph_with_exploding_functions_is_refused(model: onnx.ModelProto, said: str, tmp_path: Path) -> None:
    onnx.save(calling(10), tmp_path / "honest.onnx")
    check_model(tmp_path / "honest.onnx")
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=said), measured((tmp_path / "model.onnx").stat().st_size):
        check_model(tmp_path / "model.onnx")
