"""A decoder's first step and all later ones in one graph, which transformers.js requires and Optimum accepts.

Both graphs become branches of an If on use_cache_branch; the weights that they share are outside of it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from lora_export.errors import ExportError
from lora_export.packages import graphs
from lora_export.packages.speech import cache_switch


def joined(first: Path, later: Path) -> ir.Model:
    """One model of the graphs decoder_model and decoder_with_past_model.

    Its inputs are those of both and use_cache_branch; its outputs those of the first. ExportError if the two do not
    belong together.
    """
    without, with_past = graphs.load(first), graphs.load(later)
    versions = dict(without.graph.opset_imports)
    if versions != with_past.graph.opset_imports:
        raise ExportError("the two steps of the decoder have different operator sets", where=later)
    weights = _weights(without, with_past)
    inputs = {str(v.name): v for v in (*with_past.graph.inputs, *without.graph.inputs)}
    outputs = [ir.Value(name=v.name, type=v.type, shape=_unsized(v)) for v in without.graph.outputs]
    branches = [_branch(model.graph, outputs, inputs | weights) for model in (with_past, without)]
    switch = cache_switch()
    node = ir.node(
        "If", [switch], {"else_branch": branches[1], "then_branch": branches[0]}, outputs=outputs, name="step"
    )
    without.graph = ir.Graph(
        [*inputs.values(), switch],
        outputs,
        nodes=[node],
        initializers=list(weights.values()),
        opset_imports=versions,
        name="decoder",
    )
    for key, function in with_past.functions.items():
        without.functions.setdefault(key, function)
    graphs.forget_types(without)
    return without


def _unsized(output: ir.Value) -> ir.Shape | None:
    """The shape of an output whose axes have different names in the branches: only their number is common."""
    if output.shape is None:
        return None
    first, *others = output.shape
    return ir.Shape([first, *(n if isinstance(n, int) else f"{output.name}.{i}" for i, n in enumerate(others, 1))])


def _weights(*models: ir.Model) -> dict[str, ir.Value]:
    """The external initializers of the models, each once. ExportError where a name stands for different bytes."""
    shared: dict[str, ir.Value] = {}
    for value, tensor in (pair for model in models for pair in graphs.external(model)):
        known = shared.setdefault(str(value.name), value).const_value
        assert isinstance(known, ir.ExternalTensor)
        if _described(known) != _described(tensor):
            raise ExportError("the two steps of the decoder have different weights of one name", tensor=value.name)
    return shared


def _described(tensor: ir.ExternalTensor) -> tuple[object, ...]:
    return graphs.range_of(tensor), tensor.dtype, tuple(tensor.shape)


def _branch(graph: ir.Graph, outputs: Sequence[ir.Value], outside: Mapping[str, ir.Value]) -> ir.Graph:
    """The graph without inputs and shared weights. Those of `outputs` that it does not compute come from its cache.

    Names of its outputs get a suffix, because they must not hide those of the If.
    """
    own = {str(value.name): value for value in graph.outputs}
    for value in (*graph.inputs, *graph.initializers.values()):
        known = outside.get(str(value.name))
        if known is not None and known is not value:
            value.replace_all_uses_with(known)
    graph.inputs.clear()
    graph.outputs.clear()
    for name in [name for name in graph.initializers if name in outside]:
        del graph.initializers[name]
    for output in outputs:
        name = str(output.name)
        value = own.get(name)
        if value is None:
            past = outside[name.replace("present.", "past_key_values.", 1)]
            value = ir.Value(type=output.type)
            graph.append(ir.node("Identity", [past], outputs=[value]))
        value.name, value.shape = f"{name}/inner", None
        graph.outputs.append(value)
    graph.opset_imports.clear()
    return graph
