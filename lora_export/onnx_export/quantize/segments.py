"""Inner values of a graph whose weights need not fit into memory: the graph is run part by part.

The nodes are cut, in their order, into segments whose weights stay under a limit. Each segment runs over all feeds
before the next one is opened; what later segments read is kept meanwhile, on disk where it is large. ONNX Runtime
optimizes nothing, so that no number depends on where the cuts are.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from lora_export.contracts import Progress
from lora_export.errors import ExportError
from lora_export.graph_runs.feeds import Feed
from lora_export.onnx_export.graphs.checks import open_model, serialized
from lora_export.onnx_export.weights.dtypes import ONNX, Array
from lora_export.runtime import session_options
from lora_export.storage.workers import BLOCK

if TYPE_CHECKING:
    import onnxruntime

SEGMENT = 2**28  # bytes of a segment's weights and of what is made of its values
KEPT = 2**28  # bytes of values that wait in memory for later segments
_FOLDER = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True)
class _Lookup:
    """A node that picks rows of a table, or columns if turned: numpy does that without the table in memory."""

    node: ir.Node
    table: ir.ExternalTensor
    turned: bool


@dataclass
class _Segment:
    """nodes: in their order, or the one lookup; inputs: names of values from feeds and earlier segments; outputs:
    of values that are wanted, or that later segments read."""

    nodes: list[ir.Node]
    lookup: _Lookup | None = None
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


class Shelf:
    """Arrays by number of the feed and name, on disk as soon as those in memory exceed `limit` bytes."""

    def __init__(self, folder: Path, limit: int = KEPT) -> None:
        self._folder, self._limit, self._used, self._files = folder, limit, 0, 0
        self._held: dict[tuple[int, str], Array | Path] = {}

    def put(self, number: int, name: str, value: Array) -> None:
        if self._used + value.nbytes <= self._limit:
            self._used += value.nbytes
            self._held[number, name] = value
            return
        path = self._folder / f"{self._files}.npy"
        self._files += 1
        np.save(path, value, allow_pickle=False)
        self._held[number, name] = path

    def get(self, number: int, name: str) -> Array:
        held = self._held[number, name]
        return np.load(held, allow_pickle=False) if isinstance(held, Path) else held

    def drop(self, number: int, name: str) -> None:
        held = self._held.pop((number, name), None)
        if isinstance(held, Path):
            held.unlink()
        elif held is not None:
            self._used -= held.nbytes


def run_in_parts(
    path: Path,
    feeds: Sequence[Feed],
    wanted: Mapping[str, int],
    take: Callable[[int, str, Array], None],
    *,
    scratch: Path,
    limit: int = SEGMENT,
    progress: Progress,
) -> Iterator[tuple[str, ...]]:
    """Run a graph over feeds as far as the wanted values need it. Yields names of values whose arrays have all been
    taken, a few at a time.

    path: a graph that computes in fp32, with its weights beside it; wanted: names of values of the main graph →
    bytes that whoever takes them needs meanwhile; take: gets the number of the feed, the name, and the array;
    scratch: an empty folder for values that wait; limit: bytes of weights and of `wanted` of a segment, unless one
    node alone has more. ExportError if a value is missing, or ONNX Runtime cannot run a node.
    """
    model = open_model(path)
    model.graph.sort()
    segments = _segments(model, wanted, limit, path)
    shelf = Shelf(scratch)
    given = {str(v.name) for v in model.graph.inputs}
    for number, feed in enumerate(feeds):
        for name, array in feed.items():
            shelf.put(number, name, array)
            if name in wanted:
                take(number, name, array)
    yield tuple(name for name in wanted if name in given)
    readers = {name: at for at, segment in enumerate(segments) for name in segment.inputs}
    for at, segment in enumerate(segments):
        run = _looked_up if segment.lookup is not None else _run
        for number, values in run(path, model, segment, shelf, len(feeds)):
            for name, array in values.items():
                if name in wanted:
                    take(number, name, array)
                if readers.get(name, -1) > at:
                    shelf.put(number, name, array)
            for name in segment.inputs:
                if readers[name] == at:
                    shelf.drop(number, name)
            progress.advance(at * len(feeds) + number + 1, len(segments) * len(feeds))
        yield tuple(name for name in segment.outputs if name in wanted)


# --- where to cut ------------------------------------------------------------------------------------------


def _segments(model: ir.Model, wanted: Mapping[str, int], limit: int, path: Path) -> list[_Segment]:
    made = {str(v.name): v for node in model.graph for v in node.outputs}
    given = {str(v.name) for v in model.graph.inputs}
    missing = sorted(name for name in wanted if name not in made and name not in given)
    if missing:
        raise ExportError(
            f"the graph computes no value {missing[0]!r}",
            where=path,
            expected="the graph that was exported",
            next_step="export it again",
        )
    nodes, lookups = _needed(model.graph, [made[name] for name in wanted if name in made])
    segments = [_Segment(part) for part in _cut(nodes, lookups, wanted, limit)]
    by_value = {str(v.name): segment for segment in segments for node in segment.nodes for v in node.outputs}
    for segment in segments:
        segment.lookup = lookups.get(segment.nodes[0])
        outside = [v for node in segment.nodes for v in _reads(node, lookups) if not _is_constant(v)]
        names = dict.fromkeys(str(v.name) for v in outside)
        segment.inputs = [name for name in names if by_value.get(name) is not segment]
    read = {name for segment in segments for name in segment.inputs}
    for segment in segments:
        own = [str(v.name) for node in segment.nodes for v in node.outputs]
        segment.outputs = [name for name in own if name in wanted or name in read]
    return [segment for segment in segments if segment.outputs]


def _needed(graph: ir.Graph, ends: Collection[ir.Value]) -> tuple[list[ir.Node], dict[ir.Node, _Lookup]]:
    """The nodes that compute these values, in order, without constants; those of them that are lookups."""
    lookups: dict[ir.Node, _Lookup] = {}
    needed: set[ir.Node] = set()
    waiting = list(ends)
    while waiting:
        node = waiting.pop().producer()
        if node is None or node in needed or node.op_type == "Constant":
            continue
        needed.add(node)
        lookup = _as_lookup(node)
        if lookup is not None:
            lookups[node] = lookup
        waiting += _reads(node, lookups)
    return [node for node in graph if node in needed], lookups


def _as_lookup(node: ir.Node) -> _Lookup | None:
    axis = node.attributes.get("axis")
    if node.op_type != "Gather" or node.domain or (axis is not None and axis.as_int() != 0):
        return None
    value, turned = node.inputs[0], False
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "Transpose":
        value, turned = producer.inputs[0], True
    table = value.const_value if value is not None else None
    if not isinstance(table, ir.ExternalTensor) or len(table.shape) != 2 or table.dtype != ir.DataType.FLOAT:
        return None
    return _Lookup(node, table, turned)


def _reads(node: ir.Node, lookups: Collection[ir.Node]) -> list[ir.Value]:
    """The values of the main graph that a node reads, also in its subgraphs."""
    if node in lookups:
        return [v for v in node.inputs[1:] if v is not None]
    read = [v for v in node.inputs if v is not None]
    for attribute in node.attributes.values():
        for graph in _graphs(attribute):
            inner = ir.traversal.RecursiveGraphIterator(graph)
            read += [v for n in inner for v in n.inputs if v is not None and v.graph is node.graph]
            read += [v for v in graph.outputs if v.graph is node.graph]
    return read


def _graphs(attribute: ir.Attr) -> Sequence[ir.Graph]:
    if attribute.type == ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    return attribute.as_graphs() if attribute.type == ir.AttributeType.GRAPHS else ()


def _is_constant(value: ir.Value) -> bool:
    """Whether a segment gets the value from the model, as an initializer or by a node of its own."""
    producer = value.producer()
    return bool(producer.op_type == "Constant" if producer is not None else value.is_initializer())


def _cut(
    nodes: Sequence[ir.Node], lookups: Collection[ir.Node], wanted: Mapping[str, int], room: int
) -> Iterator[list[ir.Node]]:
    """Runs of nodes. Of the places in the second half of the `room`, the cut goes where the fewest
    values are alive."""
    alive = _alive(nodes, lookups)
    start, costs, seen = 0, [0], set[str]()  # costs: of nodes[start:start + i]
    for at, node in enumerate(nodes):
        cost = _cost(node, wanted, seen)
        while at > start:
            alone = node in lookups or nodes[at - 1] in lookups
            if not alone and costs[-1] + cost <= room:
                break
            places = [i for i in range(start + 1, at + 1) if 2 * costs[i - start] >= costs[-1]]
            cut = at if alone else min(places, key=lambda i: (alive[i], -i))
            yield list(nodes[start:cut])
            start, costs, seen = cut, [0], set()
            for earlier in nodes[cut:at]:
                costs.append(costs[-1] + _cost(earlier, wanted, seen))
            cost = _cost(node, wanted, seen)
        costs.append(costs[-1] + cost)
    if nodes:
        yield list(nodes[start:])


def _alive(nodes: Sequence[ir.Node], lookups: Collection[ir.Node]) -> list[int]:
    """How many values nodes before each place have made and nodes behind it read."""
    made = {v: at for at, node in enumerate(nodes) for v in node.outputs}
    last = {v: at for at, node in enumerate(nodes) for v in _reads(node, lookups) if v in made}
    changes = [0] * (len(nodes) + 1)
    for value, at in last.items():
        changes[made[value] + 1] += 1
        changes[at + 1] -= 1
    alive, now = [], 0
    for change in changes:
        now += change
        alive.append(now)
    return alive


def _cost(node: ir.Node, wanted: Mapping[str, int], seen: set[str]) -> int:
    """Bytes that a node adds to a segment, whose weights so far are `seen`."""
    cost = sum(wanted.get(str(v.name), 0) for v in node.outputs)
    for value in _reads(node, ()):
        if isinstance(value.const_value, ir.ExternalTensor) and str(value.name) not in seen:
            seen.add(str(value.name))
            cost += value.const_value.nbytes
    return cost


# --- running -----------------------------------------------------------------------------------------------


def _run(
    path: Path, model: ir.Model, segment: _Segment, shelf: Shelf, count: int
) -> Iterator[tuple[int, dict[str, Array]]]:
    session: onnxruntime.InferenceSession | None = None
    for number in range(count):
        feed = {name: shelf.get(number, name) for name in segment.inputs}
        try:
            session = session or _session(path, model, segment, feed)
            values = session.run(segment.outputs, feed)
        except ExportError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions share no base but this one
            raise ExportError(
                f"ONNX Runtime cannot run a part of the graph: {' '.join(str(error).split())[:500]}",
                where=path,
                expected="an fp32 graph that runs on the CPU",
                next_step="--quantizer default, which needs no calibration",
            ) from None
        yield number, dict(zip(segment.outputs, values, strict=True))


def _session(path: Path, model: ir.Model, segment: _Segment, feed: Feed) -> "onnxruntime.InferenceSession":
    import onnxruntime as ort

    graph = ir.convenience.extract(model.graph, inputs=segment.inputs, outputs=segment.outputs)
    for value in graph.inputs:
        array = feed[str(value.name)]
        value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        value.shape = ir.Shape([None] * array.ndim)
    part = ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))
    options = session_options()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False  # which would keep the largest of all sizes
    options.add_session_config_entry("session.disable_prepacking", "1")  # a second copy of each weight
    options.add_session_config_entry(_FOLDER, str(path.parent.resolve()))
    return ort.InferenceSession(serialized(part), options, providers=["CPUExecutionProvider"])


def _looked_up(
    path: Path, _model: ir.Model, segment: _Segment, shelf: Shelf, count: int
) -> Iterator[tuple[int, dict[str, Array]]]:
    lookup = segment.lookup
    assert lookup is not None
    (output,) = segment.outputs
    tensor = lookup.table
    stored = ONNX["float32"]
    shape = tuple(int(n) for n in tensor.shape)
    table = np.memmap(path.parent / str(tensor.location), stored, "r", tensor.offset or 0, shape)
    name = str(lookup.node.inputs[1].name)
    ids = [shelf.get(number, name) for number in range(count)]
    if not lookup.turned:
        for number in range(count):
            yield number, {output: table[ids[number]]}
        return
    distinct, back = np.unique(np.concatenate([i.ravel() for i in ids]), return_inverse=True)
    rows = np.empty((len(distinct), shape[0]), stored)
    step = max(1, 8 * BLOCK // (4 * shape[1]))
    for start in range(0, shape[0], step):
        rows[:, start : start + step] = table[start : start + step, distinct].T
    at = 0
    for number, one in enumerate(ids):
        yield number, {output: rows[back[at : at + one.size]].reshape(*one.shape, shape[0])}
        at += one.size
