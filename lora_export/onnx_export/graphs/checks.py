"""Checks of an ONNX file before any session opens it: a valid graph, and weights that stay in its folder.

This is the one file that handles ONNX's protobuf: what is not trusted is inspected as it is stored. onnx_ir, which
reads and changes graphs everywhere else, drops what it does not know and merges duplicates.
"""

import contextlib
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.allowed import check_onnx_folder
from lora_export.allowed.graphs import check_operators
from lora_export.choices import Precision
from lora_export.errors import ExportError
from lora_export.storage import sealed

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

_KNOWN_KEYS = frozenset({"location", "offset", "length", "checksum"})
_DEFAULT_DOMAINS = frozenset({"", "ai.onnx"})
LARGEST_EXPANDED = 1_000_000  # nodes after inlining functions; exports have thousands
DEEPEST_CALLS = 100  # nested calls of functions
_AGAIN = "export the model again with lora-export export; do not run this one"


def check_model(path: Path) -> None:
    """Raise ExportError, with file and tensor, unless the graph and the places of its weights are acceptable."""
    model = load_graph(path)
    check_external_data(path, model)
    _refuse_expansion(path, model)
    check_listed(path, model)
    _check_graph(path, model)


def check_listed(path: Path, model: "onnx.ModelProto") -> None:
    """ExportError for an operator that is not on the list in `allowed`, or for session options in the model."""
    own = {(f.domain, f.name) for f in model.functions}
    check_operators(path, ((node.domain, node.op_type) for node in _every_node(model)), own)
    if any(entry.key == "ort_config" for entry in model.metadata_props):
        raise ExportError("the model contains session options (ort_config)", where=path, expected="a graph alone")


def check_export(folder: Path, graphs: Iterable[str]) -> None:
    """Run check_model on graphs of a folder, and check the files beside them, before any runtime reads them.

    Graphs that share a folder belong to one export, or to adapters; `graphs` are names in it, or in the folders of
    a pipeline's models.
    """
    paths = [folder / name for name in graphs]
    for place in dict.fromkeys([folder, *(path.parent for path in paths)]):
        check_onnx_folder(place)
    for path in paths:
        check_model(path)


def check_loads(path: Path, precision: Precision) -> None:
    """Open the graph once without optimizing it: engines have written graphs that no session accepts."""
    import onnxruntime as ort

    from lora_export.runtime import open_session, session_options

    if precision == "bf16":
        return  # loads on CUDA only, and the machine that exports may have none
    options = session_options()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        with opened_anywhere(path) as own:
            open_session(own, "cpu", options=options)
    except Exception as error:
        raise ExportError(
            f"the engine wrote a graph that does not load: {error}", expected="a graph that opens"
        ) from error


@contextlib.contextmanager
def opened_anywhere(path: Path) -> Iterator[Path]:
    """The graph, or a copy beside it in which operators of CUDA alone are taken apart."""
    from lora_export.graph_runs.taken_apart import NAME, take_apart

    if not any(node.op_type == NAME for node in load_graph(path).graph.node):
        yield path
        return
    model, copy = open_model(path), path.with_name(f".apart-{path.name}")
    take_apart(model)
    try:
        copy.write_bytes(serialized(model))
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def count_nodes(path: Path) -> int:
    """Nodes of the main graph, as stored (before ONNX Runtime's own optimization)."""
    return len(load_graph(path).graph.node)


def load_graph(path: Path) -> "onnx.ModelProto":
    """The graph, without weights that are stored in other files."""
    import onnx

    if path.is_symlink() or not path.is_file():
        raise ExportError("the model is missing or a link", where=path, expected="a regular file")
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError has no stubs and no other base
        raise ExportError(
            f"the file is not an ONNX model: {error}", where=path, expected="an ONNX protobuf"
        ) from None


def open_model(path: Path) -> "ir.Model":
    """A graph to read or change, without weights that are stored in other files, whose places are checked first.

    ExportError for a graph that onnx_ir cannot keep whole: one with sparse tensors, or not in order.
    """
    model = load_graph(path)
    check_external_data(path, model)
    return as_ir(model, path)


def as_ir(model: "onnx.ModelProto", path: Path | None = None) -> "ir.Model":
    """The same model in onnx_ir. path: the file it was read from, whose folder has its data files."""
    import onnx_ir as ir

    if any(graph.sparse_initializer for graph in _every_graph(model)):
        raise ExportError("the graph has sparse weights", where=path, expected="dense ones, as exporters write")
    try:
        opened = ir.from_proto(model)
    except Exception as error:  # onnx_ir's errors share no base but this one
        raise ExportError(
            f"the graph cannot be read: {' '.join(str(error).split())[:300]}", where=path, expected="a valid graph"
        ) from None
    if path is not None:
        ir.external_data.set_base_dir(opened.graph, path.parent)
    return opened


def serialized(model: "ir.Model") -> bytes:
    """The bytes of a graph's file; equal for equal graphs."""
    import onnx_ir as ir

    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def moved(path: Path, places: Callable[[str], tuple[str, int | None]]) -> bytes:
    """The bytes of a graph file with its weights moved and everything else unchanged.

    places: name of a tensor → its data file, and its offset there, or None to keep the offset.
    """
    model = load_graph(path)
    for tensor in all_tensors(model):
        if tensor.external_data:
            file, offset = places(tensor.name)
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = file
                elif entry.key == "offset" and offset is not None:
                    entry.value = str(offset)
    return bytes(model.SerializeToString(deterministic=True))


# --- external data -----------------------------------------------------------------------------------------


def check_external_data(path: Path, model: "onnx.ModelProto") -> None:
    """Every tensor stored outside `path` must be in a plain file beside it, within that file's bounds.

    A session would otherwise read any file that the model names (CVE-2022-25882 and its successors).
    """
    import onnx

    for tensor in all_tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            _check_tensor(path, tensor)


def _check_tensor(path: Path, tensor: "onnx.TensorProto") -> None:
    entries = _entries(path, tensor)
    location = entries.get("location", "")
    # on other systems, a backslash separates folders and a colon marks a drive
    if not sealed.plain_name(location):
        raise _refusal(path, tensor, f"external data at {location!r}", "a plain file name beside the model")
    try:
        status = (path.parent / location).lstat()
    except (OSError, ValueError):  # ValueError: a name that no file can have
        raise _refusal(
            path, tensor, f"external data in {location!r}, which does not exist", "a regular file"
        ) from None
    if stat.S_ISLNK(status.st_mode):
        raise _refusal(path, tensor, f"external data in {location!r}, which is a symbolic link", "a file")
    if not stat.S_ISREG(status.st_mode):
        raise _refusal(path, tensor, f"external data in {location!r}, which is not a file", "a regular file")
    if status.st_nlink > 1:
        raise _refusal(path, tensor, f"external data in {location!r}, which is a hard link", "a file of its own")
    offset = _number(path, tensor, entries, "offset", 0)
    length = _number(path, tensor, entries, "length", max(0, status.st_size - offset))
    if offset + length > status.st_size:
        raise _refusal(
            path,
            tensor,
            f"bytes {offset} to {offset + length} of {location!r}, which has {status.st_size}",
            "a range inside the file",
        )


def _entries(path: Path, tensor: "onnx.TensorProto") -> dict[str, str]:
    """The external_data entries. Readers could disagree about a key that is given twice."""
    entries: dict[str, str] = {}
    for entry in tensor.external_data:
        if not (isinstance(entry.key, str) and isinstance(entry.value, str)):  # protobuf returns bytes in that case
            raise _refusal(path, tensor, f"external data has {entry.key!r}: {entry.value!r}", "UTF-8")
        if entry.key in entries:
            raise _refusal(path, tensor, f"external data gives {entry.key!r} twice", "each key once")
        if entry.key not in _KNOWN_KEYS:
            raise _refusal(
                path, tensor, f"external data has the unknown key {entry.key!r}", "location, offset, length"
            )
        entries[entry.key] = entry.value
    return entries


def _number(path: Path, tensor: "onnx.TensorProto", entries: dict[str, str], key: str, default: int) -> int:
    text = entries.get(key)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 19):
        raise _refusal(path, tensor, f"external data has the {key} {text!r}", "a number of bytes, 0 or more")
    return int(text)


def _refusal(path: Path, tensor: "onnx.TensorProto", what: str, expected: str) -> ExportError:
    return ExportError(
        what,
        where=path,
        tensor=str(tensor.name) or "(unnamed)",
        expected=expected,
        next_step=_AGAIN,
    )


# --- everything that a model holds -------------------------------------------------------------------------


def all_tensors(model: "onnx.ModelProto") -> Iterator["onnx.TensorProto"]:
    """Every tensor of a model: initializers, sparse ones, and attributes, in subgraphs and functions too."""
    for graph in _every_graph(model):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    attributes = [a for node in _every_node(model) for a in node.attribute]
    for attribute in (*attributes, *(a for f in model.functions for a in f.attribute_proto)):
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        own = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
        for one in (*attribute.sparse_tensors, *own):
            yield from (one.values, one.indices)


def _every_graph(model: "onnx.ModelProto") -> Iterator["onnx.GraphProto"]:
    """The main graph, those of training, and those inside nodes and functions."""
    waiting = [model.graph, *(g for info in model.training_info for g in (info.initialization, info.algorithm))]
    for function in model.functions:
        waiting += _inside(function.node)
        waiting += [g for a in function.attribute_proto for g in _graphs_of(a)]
    while waiting:
        graph = waiting.pop()
        yield graph
        waiting += _inside(graph.node)


def _every_node(model: "onnx.ModelProto") -> Iterator["onnx.NodeProto"]:
    for function in model.functions:
        yield from function.node
    for graph in _every_graph(model):
        yield from graph.node


def _inside(nodes: "Iterable[onnx.NodeProto]") -> "list[onnx.GraphProto]":
    return [graph for node in nodes for attribute in node.attribute for graph in _graphs_of(attribute)]


def _graphs_of(attribute: "onnx.AttributeProto") -> "list[onnx.GraphProto]":
    return [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ())]


# --- the graph itself --------------------------------------------------------------------------------------


def _refuse_expansion(path: Path, model: "onnx.ModelProto") -> None:
    """ExportError for functions that call themselves, or that expand to more than LARGEST_EXPANDED nodes.

    A session inlines a model's own functions: thirty of them, each calling the previous one twice, are a kilobyte
    in the file and a billion nodes in memory.
    """
    functions = {(f.domain, f.name): f for f in model.functions}
    known: dict[tuple[str, str], int] = {}

    def refusal(what: str) -> ExportError:
        return ExportError(
            f"the graph's own functions expand to {what}",
            where=path,
            expected="a graph about as large as its file",
            next_step=_AGAIN,
        )

    def expanded(nodes: "Iterable[onnx.NodeProto]", depth: int) -> int:
        if depth > DEEPEST_CALLS:
            raise refusal(f"more than {DEEPEST_CALLS} nested calls")
        count, waiting = 0, [nodes]
        while waiting:
            for node in waiting.pop():
                called = (node.domain, node.op_type)
                if called in functions and called not in known:
                    known[called] = expanded(functions[called].node, depth + 1)
                count += known.get(called, 1)
                if count > LARGEST_EXPANDED:
                    raise refusal(f"more than {LARGEST_EXPANDED:,} nodes")
                waiting += [graph.node for graph in _inside([node])]
        return count

    if functions:
        expanded(model.graph.node, 0)


def _check_graph(path: Path, model: "onnx.ModelProto") -> None:
    """onnx.checker on a copy without weights, in which ONNX Runtime's own operators have its own domain.

    The genai builder and ONNX Runtime's fusions put SimplifiedLayerNormalization into the standard domain, where
    ONNX Runtime finds it and the checker does not; in branches too. `model` is changed.
    """
    import onnx

    for node in (node for graph in _every_graph(model) for node in graph.node):
        if isinstance(node.op_type, bytes):  # text that is not UTF-8
            raise ExportError(f"an operator is named {node.op_type!r}", where=path, expected="a name in UTF-8")
        if node.domain in _DEFAULT_DOMAINS and not onnx.defs.has(node.op_type, ""):
            node.domain = "com.microsoft"
    locations = {e.value for t in all_tensors(model) for e in t.external_data if e.key == "location"}
    with tempfile.TemporaryDirectory(prefix="lora-export-check-") as folder:
        copy = Path(folder, "model.onnx")
        copy.write_bytes(model.SerializeToString())
        for location in locations - {copy.name}:
            Path(folder, location).touch()  # the checker requires the file and reads nothing from it
        try:
            onnx.checker.check_model(str(copy))
        except (onnx.checker.ValidationError, ValueError) as error:
            raise ExportError(
                f"the graph is not valid ONNX: {' '.join(str(error).split())}",
                where=path,
                expected="a model that onnx.checker accepts",
            ) from None
