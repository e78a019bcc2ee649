"""Are two graphs the same work? Compared after ONNX Runtime's own optimization for a provider.

Two graphs with the same operators, attributes, wiring, shapes and types, on the same provider, launch the
same kernels: their weights' values cannot make one of them slower.
"""

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.onnx_export.checks import check_external_data, load_graph

if TYPE_CHECKING:
    import onnx

SMALL_CONSTANT = 64  # elements; shapes, axes and indices are that small, weights are not
SHOWN = 8
_EXTERNAL_FROM = "1024"  # bytes; ONNX Runtime needs small shape constants inline


def compare(base: Path, merged: Path, provider: str) -> tuple[bool, tuple[str, ...]]:
    """Whether two models are the same graph once optimized for `provider`, and if not, the first differences.

    base and merged: .onnx files. Values count for small integer constants only (shapes, axes): an adapter may
    change any weight. Needs as much temporary disk space as the larger model.
    """
    a, b = (describe_optimized(path, provider) for path in (base, merged))
    return a == b, tuple(_differences(a, b))


def fingerprint(model: Path, provider: str) -> str:
    """SHA-256 of the optimized graph's structure; equal for identical graphs."""
    return hashlib.sha256("\n".join(describe_optimized(model, provider)).encode()).hexdigest()


def describe_optimized(model: Path, provider: str) -> tuple[str, ...]:
    """One line for each input, output and node of the graph that ONNX Runtime makes of `model`."""
    from lora_export.runtime import open_session, session_options

    check_external_data(model, load_graph(model))
    with tempfile.TemporaryDirectory(prefix="lora-export-graph-") as folder:
        optimized = Path(folder, "optimized.onnx")
        options = session_options()
        options.optimized_model_filepath = str(optimized)
        for key, value in (
            ("session.optimized_model_external_initializers_file_name", "weights.bin"),
            ("session.optimized_model_external_initializers_min_size_in_bytes", _EXTERNAL_FROM),
            ("session.disable_prepacking", "1"),
        ):
            options.add_session_config_entry(key, value)
        open_session(model, provider, options=options)
        return tuple(_describe(load_graph(optimized)))


# --- a graph in words --------------------------------------------------------------------------------------


def _describe(model: "onnx.ModelProto") -> Iterator[str]:
    names = _Names()
    for value in model.graph.input:
        yield f"input {names.of(value.name)} {value.name} {_type(value)}"
    yield from _describe_nodes(model.graph, names)
    for value in model.graph.output:
        yield f"output {value.name} from {names.of(value.name)} {_type(value)}"


class _Names:
    """Values numbered in the order in which they appear, so that an engine's naming does not count."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {"": 0}

    def of(self, name: str) -> str:
        return f"%{self._numbers.setdefault(name, len(self._numbers))}" if name else "-"


def _describe_nodes(graph: "onnx.GraphProto", names: _Names) -> Iterator[str]:
    constants = {tensor.name: _tensor(tensor) for tensor in graph.initializer}
    for node in graph.node:
        inputs = ", ".join(
            names.of(name) + (f" {constants[name]}" if name in constants else "") for name in node.input
        )
        attributes = ", ".join(sorted(_attribute(a, names) for a in node.attribute))
        outputs = ", ".join(names.of(name) for name in node.output)
        yield f"{node.domain or 'ai.onnx'}.{node.op_type}({inputs}) [{attributes}] -> {outputs}"


def _attribute(attribute: "onnx.AttributeProto", names: _Names) -> str:
    import onnx

    kind = onnx.AttributeProto
    if attribute.type == kind.TENSOR:
        return f"{attribute.name}={_tensor(attribute.t)}"
    if attribute.type == kind.GRAPH:
        return f"{attribute.name}={{{'; '.join(_describe_nodes(attribute.g, names))}}}"
    return f"{attribute.name}={onnx.helper.get_attribute_value(attribute)!r}"


def _tensor(tensor: "onnx.TensorProto") -> str:
    import onnx

    words = f"{onnx.TensorProto.DataType.Name(tensor.data_type).lower()}{list(tensor.dims)}"
    integer = tensor.data_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL)
    inline = tensor.data_location != onnx.TensorProto.EXTERNAL
    if integer and inline and _elements(tensor) <= SMALL_CONSTANT:
        return f"{words}={onnx.numpy_helper.to_array(tensor).tolist()}"
    return words


def _elements(tensor: "onnx.TensorProto") -> int:
    count = 1
    for dim in tensor.dims:
        count *= dim
    return count


def _type(value: "onnx.ValueInfoProto") -> str:
    import onnx

    tensor = value.type.tensor_type
    dims = [d.dim_param or d.dim_value for d in tensor.shape.dim]
    return f"{onnx.TensorProto.DataType.Name(tensor.elem_type).lower()}{dims}"


# --- differences in words ----------------------------------------------------------------------------------


def _differences(a: tuple[str, ...], b: tuple[str, ...]) -> Iterator[str]:
    if a == b:
        return
    if len(a) != len(b):
        yield f"the base has {len(a)} inputs, nodes and outputs, the other {len(b)}"
    yield from _counts(a, b)
    unlike = [(i, x, y) for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y]
    for i, x, y in unlike[:SHOWN]:
        yield f"line {i}: the base has {x}; the other has {y}"
    if len(unlike) > SHOWN:
        yield f"and {len(unlike) - SHOWN} more lines differ"


def _counts(a: tuple[str, ...], b: tuple[str, ...]) -> Iterator[str]:
    ours, theirs = (Counter(line.split("(")[0].split(" ")[0] for line in lines) for lines in (a, b))
    for operator in sorted(ours.keys() | theirs.keys()):
        if ours[operator] != theirs[operator]:
            yield f"{operator}: {ours[operator]} in the base, {theirs[operator]} in the other"
