"""Files that ask for much: a second for each MB of theirs, ten times their size and 100 MB of memory, and words."""

import contextlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from lora_export.checkpoint import Checkpoint, open_checkpoint
from lora_export.contracts import MergeOptions
from lora_export.errors import LoraExportError
from lora_export.manifest import NAME as MANIFEST_NAME
from lora_export.merging.certificate.document import NAME as CERTIFICATE_NAME
from lora_export.merging.certificate.document import SCHEMA_VERSION, read_certificate
from lora_export.onnx_export.weights import map as weights_map
from lora_export.onnx_export.weights.map import Piece, Quantization, Recipe, Weight, WeightsMap
from lora_export.packages import archive, contents
from lora_export.report import load
from lora_export.storage.sealed import write_sealed
from lora_export.workflows.inspection import inspect_folder
from tests.fuzz import adapters
from tests.fuzz.bombs import bombs, tar_archives, zip_archives
from tests.fuzz.files import entries, file_bytes
from tests.fuzz.guard import attempt, harness, measured
from tests.fuzz.test_fuzz_adapters import check as check_adapter
from tests.fuzz.test_fuzz_checkpoints import DATA, ENTRIES, INDEX, NAMES, SHARDS, check_ranges
from tests.fuzz.test_fuzz_runs import FIELDS, MANIFEST, REPORT, write_run

EXPANDED = 100  # times its size that an archive may become
BESIDES = 2**26  # bytes


def tried(folder: Path, size: int, call: Callable[[], Any]) -> Any:
    """The result or the refusal, within the bounds for a file of this size."""
    with measured(size):
        return attempt(folder, call)


@harness(8, kind=st.just("tar.zst"), content=tar_archives())
def test_bomb_tar(kind: str, content: bytes) -> None:
    _unpack(kind, content)


@harness(8, kind=st.just("zip"), content=zip_archives())
def test_bomb_zip(kind: str, content: bytes) -> None:
    _unpack(kind, content)


def _unpack(kind: str, content: bytes) -> None:
    """What comes out are plain files below the folder, of no more bytes than the archive may have."""
    with tempfile.TemporaryDirectory() as name:
        folder, path = Path(name, "out"), Path(name, f"p.{kind}")
        folder.mkdir()
        path.write_bytes(content)
        tried(Path(name), len(content), lambda: archive.extract(path, folder))
        found = list(folder.rglob("*"))
        assert not any(p.is_symlink() or not (p.is_dir() or p.is_file()) for p in found)
        assert sum(p.stat().st_size for p in found if p.is_file()) <= EXPANDED * len(content) + BESIDES
        assert {p.name for p in Path(name).iterdir()} == {"out", path.name}


HEADER_KEYS = ("dtype", "shape", "data_offsets", "__metadata__")


@harness(8, header=bombs(ENTRIES, HEADER_KEYS), data=st.sampled_from([DATA, b""]))
def test_bomb_header(header: bytes, data: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text("{}")
        content = len(header).to_bytes(8, "little") + header + data
        (folder / "model.safetensors").write_bytes(content)
        found = tried(folder, len(content), lambda: open_checkpoint(folder))
        if isinstance(found, Checkpoint):
            check_ranges(dict(found.tensors))


@harness(
    8, index=bombs(INDEX, NAMES), config=st.just(b"{}") | bombs({"model_type": "llama", "text_config": {"a": 1}})
)
def test_bomb_index(index: bytes, config: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for shard, content in SHARDS.items():
            (folder / shard).write_bytes(content)
        (folder / "config.json").write_bytes(config)
        (folder / "model.safetensors.index.json").write_bytes(index)
        tried(folder, len(index) + len(config), lambda: open_checkpoint(folder))


def small_map() -> dict[str, Any]:
    quantized = Quantization("int4", "packed", 32)
    recipes = [Recipe((Piece("a", 0, 4),), transposed=True), Recipe((Piece("b", 0, 4),), quantized=quantized)]
    weights = [Weight(f"w{i}", "model.data", "float32", (4, 4), r, i * 4096) for i, r in enumerate(recipes)]
    with tempfile.TemporaryDirectory() as name:
        weights_map.write(Path(name), WeightsMap((*weights, Weight("c", "c.bin", "int64", (2,))), {"a": "00"}))
        found: dict[str, Any] = json.loads((Path(name) / weights_map.NAME).read_text())
        return found


MAP = small_map()
MAP_KEYS = (*MAP, *MAP["weights"][0], "rows", "tensor", "quantized", "computed_from", "plus")


@harness(8, document=bombs(MAP, MAP_KEYS))
def test_bomb_weights_map(document: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / weights_map.NAME).write_bytes(document)
        found = tried(folder, len(document), lambda: weights_map.read(folder))
        if isinstance(found, WeightsMap):
            assert all(0 <= size < 2**63 for size in found.sizes.values())


RECORD = {
    "name": "w", "operation": "updated", "dtype": "F32", "shape": [2, 3], "kinds": ["lora"], "checked": 1,
    "saturated": 0, "relative_delta": 0.1, "survival": 1.0, "max_ulps": 0.0, "mean_ulps": 0.0, "hash_in": "a",
    "hash_out": "b",
}  # fmt: skip
CERTIFICATE = {
    "schema_version": SCHEMA_VERSION, "tool": {"name": "lora-export", "version": "1"}, "versions": {"torch": "2"},
    "options": {k: v for k, v in asdict(MergeOptions()).items() if k != "force"},
    "base": {"files": {"model.safetensors": {"size": 3}}}, "tensors": {"updated": 1}, "unchecked": {},
    "records": [RECORD, {**RECORD, "name": "v"}],
    "adapters": [{"kind": "lora", "weight": 1.0, "base_model": None, "sha256": {"adapter_config.json": "a"}}],
    "adapter_tensors": {"used": 2, "total": 2}, "delta_survival": 1.0,
    "files": {"model.safetensors": {"size": 3, "header_sha256": "c"}}, "base_checks": [],
}  # fmt: skip


def write_as(path: Path, document: bytes, seal: bool) -> int:
    """Its size. seal: with the digest that belongs to it, so that more than the digest is looked at."""
    path.write_bytes(document)
    if seal:
        with contextlib.suppress(ValueError, RecursionError, TypeError, LoraExportError):
            write_sealed(path, json.loads(document))
    return path.stat().st_size


@harness(8, document=bombs(CERTIFICATE, (*CERTIFICATE, *RECORD)), seal=st.booleans())
def test_bomb_certificate(document: bytes, seal: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_as(folder / CERTIFICATE_NAME, document, seal)
        tried(folder, size, lambda: read_certificate(folder))


PACKAGE = {
    "schema_version": 1, "kind": contents.KIND, "base": {"name": "b"}, "adapters": [{"name": "a"}],
    "latency": {"verdict": None}, "target": "hf", "name": "model",
    "files": {"a/b.json": {"sha256": "a", "size": 2}},
    "task": "text-generation", "architecture": "LlamaForCausalLM", "precision": "fp32", "variants": ["fp32"],
    "providers": ["cpu"], "onnx_adapters": [], "sample": {"prompt": "p", "text": "t", "numbers": [1.0]},
}  # fmt: skip


@harness(8, document=bombs(PACKAGE, (*PACKAGE, "sha256", "size", "name")), seal=st.booleans())
def test_bomb_package_manifest(document: bytes, seal: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_as(folder / contents.NAME, document, seal)
        found = tried(folder, size, lambda: contents.read(folder))
        if not isinstance(found, LoraExportError):
            assert tried(folder, size, lambda: contents.compare(folder, found))


@harness(8, document=bombs(MANIFEST, (*MANIFEST, "size", "name")), seal=st.booleans())
def test_bomb_run_manifest(document: bytes, seal: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_run(folder, b"{}", json.dumps(REPORT).encode(), b"{}")
        size = write_as(folder / MANIFEST_NAME, document, seal)
        tried(folder, size, lambda: inspect_folder(folder))


@harness(8, document=bombs(REPORT, FIELDS))
def test_bomb_report(document: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "report.json").write_bytes(document)
        tried(folder, len(document), lambda: load(folder))


@harness(8, document=bombs(adapters.KINDS["lora"][0], adapters.KEYS))
def test_bomb_adapter_config(document: bytes) -> None:
    """The base and the tensors are small, so the bounds are those of the configuration."""
    tensors = file_bytes(entries(adapters.tensors("lora")))
    with measured(2 * len(document)):  # planned, and inspected
        check_adapter(document, tensors)
