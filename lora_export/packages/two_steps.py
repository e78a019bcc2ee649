"""A decoder's first step and all further ones in one graph, which transformers.js wants and Optimum takes.

Both graphs become branches of an If on use_cache_branch; the weights, which they share, lie outside of it.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.errors import ExportError
from lora_export.packages import graphs
from lora_export.packages.speech import CACHED

if TYPE_CHECKING:
    import onnx


def joined(first: Path, later: Path) -> "tuple[onnx.ModelProto, dict[str, Path]]":
    """One model of the graphs decoder_model and decoder_with_past_model, and the folder of each external tensor.

    Its inputs are those of both and use_cache_branch; its outputs those of the first. ExportError if the two do not
    belong together.
    """
    import onnx
    from onnx import TensorProto, helper

    without, with_past = graphs.load(first), graphs.load(later)
    if [(o.domain, o.version) for o in without.opset_import] != [
        (o.domain, o.version) for o in with_past.opset_import
    ]:
        raise ExportError("the two steps of the decoder have different operator sets", where=later)
    outside = _shared([without.graph, with_past.graph])
    weights = {t.name for t in outside}
    inputs = {i.name: i for g in (with_past.graph, without.graph) for i in g.input if i.name not in weights}
    outputs = list(without.graph.output)
    branches = [_branch(with_past.graph, outputs, weights), _branch(without.graph, outputs, weights)]
    node = helper.make_node(
        "If", [CACHED], [o.name for o in outputs], then_branch=branches[0], else_branch=branches[1]
    )
    made = onnx.ModelProto()
    made.CopyFrom(without)
    made.graph.CopyFrom(
        helper.make_graph(
            [node],
            "decoder",
            [*inputs.values(), helper.make_tensor_value_info(CACHED, TensorProto.BOOL, [1])],
            [_unsized(o) for o in outputs],
            outside,
        )
    )
    made.functions.extend(f for f in with_past.functions if f.name not in {g.name for g in without.functions})
    return made, dict.fromkeys(weights, first.parent)


def _unsized(output: "onnx.ValueInfoProto") -> "onnx.ValueInfoProto":
    """An output whose sizes the branches do not agree on by name: their number is all that holds for both."""
    import onnx

    new = onnx.ValueInfoProto()
    new.CopyFrom(output)
    for i, dim in enumerate(new.type.tensor_type.shape.dim):
        if not dim.dim_value:
            dim.dim_param = dim.dim_param if i == 0 else f"{output.name}.{i}"
    return new


def _shared(both: "Iterable[onnx.GraphProto]") -> "list[onnx.TensorProto]":
    """The external initializers of the two, each once. ExportError where a name stands for different bytes."""
    found: dict[str, onnx.TensorProto] = {}
    for graph in both:
        for tensor in [t for t in graph.initializer if t.external_data]:
            known = found.setdefault(tensor.name, tensor)
            if known.SerializeToString(deterministic=True) != tensor.SerializeToString(deterministic=True):
                raise ExportError(
                    "the two steps of the decoder have different weights of one name", tensor=tensor.name
                )
    return list(found.values())


def _branch(graph: "onnx.GraphProto", outputs: "list[onnx.ValueInfoProto]", outside: set[str]) -> "onnx.GraphProto":
    """The graph without inputs and shared weights; what it does not compute of `outputs`, it hands on of its cache.

    Names of outputs get a suffix, as those of the If may not be hidden.
    """
    import onnx
    from onnx import helper

    own = {o.name for o in graph.output}
    nodes = []
    for node in graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        for ends in (copy.input, copy.output):
            for i, name in enumerate(ends):
                ends[i] = f"{name}/inner" if name in own else name
        nodes.append(copy)
    ends_of = []
    for output in outputs:
        if output.name not in own:
            past = output.name.replace("present.", "past_key_values.", 1)
            nodes.append(helper.make_node("Identity", [past], [f"{output.name}/inner"]))
        ends_of.append(helper.make_tensor_value_info(
            f"{output.name}/inner", output.type.tensor_type.elem_type, None))  # fmt: skip
    inline = [t for t in graph.initializer if t.name not in outside]
    return helper.make_graph(nodes, graph.name or "step", [], ends_of, inline)
