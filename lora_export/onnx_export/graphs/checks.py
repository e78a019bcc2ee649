"""Checks of an ONNX file before any session sees it: a valid graph, and weights that stay in its folder."""

import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.allowed import check_onnx_folder
from lora_export.allowed.graphs import check_operators
from lora_export.choices import Precision
from lora_export.errors import ExportError
from lora_export.onnx_export.graphs.expansion import refuse_expansion
from lora_export.storage import sealed

if TYPE_CHECKING:
    import onnx

_KNOWN_KEYS = frozenset({"location", "offset", "length", "checksum"})
_DEFAULT_DOMAINS = frozenset({"", "ai.onnx"})


def check_model(path: Path) -> None:
    """Raise ExportError, with file and tensor, if the graph or where its weights lie is not acceptable."""
    model = load_graph(path)
    check_external_data(path, model)
    refuse_expansion(path, model)
    check_operators(path, model)
    _check_graph(path, model)


def check_export(folder: Path, graphs: Iterable[str]) -> None:
    """check_model for graphs of a folder, and lists for what lies beside them: before any runtime reads it.

    Graphs that share a folder are those of one export, or of adapters; `graphs` are names in it.
    """
    check_onnx_folder(folder)
    for name in graphs:
        check_model(folder / name)


def check_loads(path: Path, precision: Precision) -> None:
    """Open the graph once without optimizing it: engines have written graphs that no session accepts."""
    import onnxruntime as ort

    from lora_export.runtime import open_session, session_options

    if precision == "bf16":
        return  # loads on CUDA only, and an export may be made without one
    options = session_options()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        open_session(path, "cpu", options=options)
    except Exception as error:
        raise ExportError(
            f"the engine wrote a graph that does not load: {error}", expected="a graph that opens"
        ) from error


def count_nodes(path: Path) -> int:
    """Nodes of the main graph, as stored (before ONNX Runtime's own optimization)."""
    return len(load_graph(path).graph.node)


def load_graph(path: Path) -> "onnx.ModelProto":
    """The graph without the weights that lie in other files."""
    import onnx

    if path.is_symlink() or not path.is_file():
        raise ExportError("the model is missing or a link", where=path, expected="a regular file")
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError has no stubs and no other base
        raise ExportError(f"the file is no ONNX model: {error}", where=path, expected="an ONNX protobuf") from None


# --- external data -----------------------------------------------------------------------------------------


def check_external_data(path: Path, model: "onnx.ModelProto") -> None:
    """Every tensor stored outside `path` must lie in a plain file beside it, inside that file's bounds.

    A session would otherwise read whatever file the model names (CVE-2022-25882 and its successors).
    """
    import onnx

    for tensor in all_tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            _check_tensor(path, tensor)


def _check_tensor(path: Path, tensor: "onnx.TensorProto") -> None:
    entries = _entries(path, tensor)
    location = entries.get("location", "")
    # a backslash or a colon is a folder or a drive on another system than this one
    if not sealed.plain_name(location):
        raise _refusal(path, tensor, f"external data at {location!r}", "a plain file name beside the model")
    try:
        status = (path.parent / location).lstat()
    except (OSError, ValueError):  # also a name that no file can have
        raise _refusal(
            path, tensor, f"external data in {location!r}, which is not there", "a regular file"
        ) from None
    if stat.S_ISLNK(status.st_mode):
        raise _refusal(path, tensor, f"external data in {location!r}, which is a symbolic link", "a file")
    if not stat.S_ISREG(status.st_mode):
        raise _refusal(path, tensor, f"external data in {location!r}, which is no file", "a regular file")
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
    """The external_data entries; a key given twice could be read one way here and another way elsewhere."""
    entries: dict[str, str] = {}
    for entry in tensor.external_data:
        if not (isinstance(entry.key, str) and isinstance(entry.value, str)):  # protobuf hands over bytes then
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


def _refusal(path: Path, tensor: "onnx.TensorProto", found: str, expected: str) -> ExportError:
    return ExportError(
        found,
        where=path,
        tensor=str(tensor.name) or "(unnamed)",
        expected=expected,
        next_step="export the model again with lora-export export; do not run this one",
    )


def all_tensors(model: "onnx.ModelProto") -> Iterator["onnx.TensorProto"]:
    """Every tensor a model holds: initializers, sparse ones, attributes, in subgraphs and functions too."""
    graphs = [model.graph]
    graphs.extend(t for info in model.training_info for t in (info.initialization, info.algorithm))
    for graph in graphs:
        yield from _graph_tensors(graph)
    for function in model.functions:
        yield from _node_tensors(function.node)
        yield from _attribute_tensors(function.attribute_proto)


def _graph_tensors(graph: "onnx.GraphProto") -> Iterator["onnx.TensorProto"]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: "Iterable[onnx.NodeProto]") -> Iterator["onnx.TensorProto"]:
    for node in nodes:
        yield from _attribute_tensors(node.attribute)


def _attribute_tensors(attributes: "Iterable[onnx.AttributeProto]") -> Iterator["onnx.TensorProto"]:
    for attribute in attributes:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        sparse = [*attribute.sparse_tensors]
        if attribute.HasField("sparse_tensor"):
            sparse.append(attribute.sparse_tensor)
        for one in sparse:
            yield from (one.values, one.indices)
        graphs = [*attribute.graphs]
        if attribute.HasField("g"):
            graphs.append(attribute.g)
        for graph in graphs:
            yield from _graph_tensors(graph)


# --- the graph itself --------------------------------------------------------------------------------------


def _check_graph(path: Path, model: "onnx.ModelProto") -> None:
    """onnx.checker on a copy without weights, in which ONNX Runtime's own operators carry its own domain.

    The genai builder puts SimplifiedLayerNormalization into the standard domain, where ONNX Runtime finds it
    and the checker does not. `model` is changed.
    """
    import onnx

    for node in model.graph.node:
        if isinstance(node.op_type, bytes):  # what protobuf makes of text that is no UTF-8
            raise ExportError(f"an operator is called {node.op_type!r}", where=path, expected="a name in UTF-8")
        if node.domain in _DEFAULT_DOMAINS and not onnx.defs.has(node.op_type, ""):
            node.domain = "com.microsoft"
    locations = {e.value for t in all_tensors(model) for e in t.external_data if e.key == "location"}
    with tempfile.TemporaryDirectory(prefix="lora-export-check-") as folder:
        copy = Path(folder, "model.onnx")
        copy.write_bytes(model.SerializeToString())
        for location in locations - {copy.name}:
            Path(folder, location).touch()  # the checker wants the file to exist, and reads none of it
        try:
            onnx.checker.check_model(str(copy))
        except (onnx.checker.ValidationError, ValueError) as error:
            raise ExportError(
                f"the graph is not valid ONNX: {' '.join(str(error).split())}",
                where=path,
                expected="a model that onnx.checker accepts",
            ) from None
