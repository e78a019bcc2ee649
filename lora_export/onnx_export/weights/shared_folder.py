"""Many adapters of one base in one folder: base.bin, and for each a graph and the few weights that it changed.

    base.onnx   base.bin            an export of the base, as any other
    NAME.onnx   NAME-1f3a9c2e.bin   the same graph; what differs from the base lies in its own data file

Runtimes and checkers take weights from files beside the graph and from nowhere else: no links, no other folder. So
all adapters lie together. A data file is named by what is in it, and a graph comes last: a reader sees the old
adapter or the new one.
"""

import contextlib
import hashlib
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lora_export.checkpoint.companions import companion_files
from lora_export.contracts import Progress, TensorSource
from lora_export.errors import ExportError, InputError
from lora_export.onnx_export import records
from lora_export.onnx_export.graphs.checks import check_loads, check_model, moved
from lora_export.onnx_export.quantize.certificate import statistics_beside
from lora_export.onnx_export.records import ExportRecord
from lora_export.onnx_export.weights import map as weights_map
from lora_export.onnx_export.weights.layout import DataFiles
from lora_export.onnx_export.weights.map import Weight, WeightsMap, placed
from lora_export.storage import disk, files, sealed

BASE_GRAPH, BASE_DATA = "base.onnx", "base.bin"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class Shared:
    """earlier: the export that the graph is taken from; found: its map; record: its export.json."""

    earlier: Path
    found: WeightsMap
    record: ExportRecord

    @property
    def graph(self) -> Path:
        return self.earlier / self.record.graphs[0]


def check_name(name: str, record: ExportRecord, earlier: Path) -> None:
    """InputError for a name that is not a valid file name on every system, and for an export of several graphs."""
    if not _NAME.fullmatch(name) or name.lower() == "base":
        raise InputError(
            f"an adapter cannot be called {name!r} here",
            expected="up to 64 letters, digits, - and _, beginning with a letter or digit; not base",
            next_step="--shared-as with such a name",
        )
    if len(record.graphs) != 1:
        raise InputError(
            f"the export has {len(record.graphs)} graphs: {', '.join(record.graphs)}",
            where=earlier,
            expected="an export of one graph, for adapters to share",
            next_step="the same command without --shared-as: a folder of its own for each adapter",
        )


@contextlib.contextmanager
def opened(root: Path, shared: Shared, inputs: list[Path]) -> Iterator[Path]:
    """The folder to add an adapter to: `root` itself, or what becomes it, with the base in it already."""
    if not (root / BASE_GRAPH).is_file():
        if root.is_dir() and any(root.iterdir()):
            raise InputError(
                "the folder holds something else than adapters that share a base",
                where=root,
                expected=f"{BASE_GRAPH} and {BASE_DATA}, or no such folder yet",
                next_step="choose another -o",
            )
        with files.output_folder(root, False, inputs=inputs) as stage:
            _write_base(stage, shared)
            yield stage
        return
    with files.added_to(root):
        _refuse_other_base(root, shared)
        yield root


def _write_base(folder: Path, shared: Shared) -> None:
    """The export under the names that adapters share."""
    (data,) = shared.found.sizes
    own = (data, weights_map.NAME, records.NAME, ".onnx", ".bin")  # and those of adapters, if that is such a folder
    for path in sorted(p for p in shared.earlier.iterdir() if p.is_file() and not p.name.endswith(own)):
        sealed.copy(path, folder / path.name)
    with (shared.earlier / data).open("rb") as source, (folder / BASE_DATA).open("xb") as target:
        disk.copy_range(source.fileno(), 0, shared.found.sizes[data], target.fileno(), 0)
    (folder / BASE_GRAPH).write_bytes(_moved(shared.graph, {}))
    settings = folder / "genai_config.json"
    if settings.is_file():
        config = sealed.read_json(settings)
        config["model"]["decoder"]["filename"] = BASE_GRAPH
        sealed.write_json(settings, config)
    weights = tuple(replace(w, file=BASE_DATA) for w in shared.found.weights)
    weights_map.write(folder, WeightsMap(weights, shared.found.hashes))
    kept = [n for n in shared.record.made_by_engine if n != shared.graph.name]
    made = tuple(sorted([*kept, BASE_GRAPH]))
    records.write_record(folder, replace(shared.record, graphs=(BASE_GRAPH,), made_by_engine=made))


def _refuse_other_base(root: Path, shared: Shared) -> None:
    there = weights_map.read(root)
    same = there.hashes == shared.found.hashes and ((root / BASE_GRAPH).read_bytes() == _moved(shared.graph, {}))
    if not same:
        raise ExportError(
            "the folder shares another base, or another export of it",
            where=root,
            expected=f"base.onnx as in {shared.earlier}",
            next_step=f"--graph-from {root}, or another -o",
        )


def add(
    folder: Path, name: str, shared: Shared, source: TensorSource, hashes: Mapping[str, str], force: bool,
    progress: Progress,
) -> str:  # fmt: skip
    """Write the adapter `name` into `folder`; its graph's name. InputError if it is there without `force`."""
    started = time.monotonic()
    graph = folder / f"{name}.onnx"
    if graph.exists() and not force:
        raise InputError(
            f"the folder has an adapter called {name}",
            where=graph,
            expected="another name",
            next_step="--force to replace it, or --shared-as with another name",
        )
    touched = [
        w for w in shared.found.weights
        if any(hashes[p.tensor] != shared.found.hashes[p.tensor] for p in w.recipe.pieces)
    ]  # fmt: skip
    data = f"{name}-{_digest(touched, hashes)}.bin"
    with _partial(folder, name, folder / data) as (unfinished_data, unfinished_graph):
        weights = placed(replace(w, file=unfinished_data.name) for w in touched)
        disk.check_space(folder, sum(w.nbytes for w in weights))
        unfinished_data.touch(mode=0o666, exist_ok=False)
        statistics = statistics_beside(shared.earlier, shared.found)
        DataFiles(folder, WeightsMap(weights), source, progress, statistics=statistics).write()
        unfinished_data.replace(folder / data)
        unfinished_graph.write_bytes(_moved(shared.graph, {w.name: replace(w, file=data) for w in weights}))
        check_model(unfinished_graph)
        check_loads(unfinished_graph, shared.record.precision)
        seconds = round(time.monotonic() - started, 3)
        own = replace(shared.record, graphs=(graph.name,), files=(graph.name, data), seconds=seconds)
        records.write_record(folder, own, f"{name}.{records.NAME}")
        for path in (folder / data, unfinished_graph):
            disk.sync(path)
        unfinished_graph.replace(graph)
    for left in folder.iterdir():
        if re.fullmatch(re.escape(name) + r"-[0-9a-f]{8}\.bin", left.name) and left.name != data:
            left.unlink()
    return graph.name


def warn_of_companions(model: Path, folder: Path, progress: Progress) -> None:
    """Tokenizer and templates are shared, too: another one than the base's is not written anywhere."""
    for path in companion_files(model):
        there = folder / path.name
        if not there.is_file() or (
            path.name != "tokenizer_config.json" and there.read_bytes() != path.read_bytes()
        ):
            progress.warn(f"{path.name} of this model is another than the shared one, which stays as it is")


def _digest(touched: list[Weight], hashes: Mapping[str, str]) -> str:
    parts = sorted({f"{p.tensor} {hashes[p.tensor]}" for w in touched for p in w.recipe.pieces})
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


@contextlib.contextmanager
def _partial(folder: Path, name: str, data: Path) -> Iterator[tuple[Path, Path]]:
    """Unguessable names for the unfinished data and graph; what a killed run left is removed first.

    data: the name that the data get before the graph is whole; if that fails they go, too, unless they were there.
    """
    token = secrets.token_hex(16)
    pair = folder / f".{name}.partial-{token}.bin", folder / f".{name}.partial-{token}.onnx"
    left = () if data.exists() else (data,)
    stale = re.compile(rf"\.{re.escape(name)}(\.export\.json)?\.partial-[0-9a-f]{{32}}(\.bin|\.onnx)?")
    for path in [p for p in folder.iterdir() if stale.fullmatch(p.name)]:
        if path.is_symlink() or path.is_file():
            path.unlink()
    try:
        yield pair
    except BaseException:
        for path in (*pair, *left):
            path.unlink(missing_ok=True)
        raise


def _moved(graph: Path, own: Mapping[str, Weight]) -> bytes:
    """The graph with its weights in base.bin, and those of `own` where they say."""

    def place(name: str) -> tuple[str, int | None]:
        return (own[name].file, own[name].offset) if name in own else (BASE_DATA, None)

    return moved(graph, place)
