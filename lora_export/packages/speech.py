"""Whisper as the genai builder exports it, under the names and with the inputs of Optimum and transformers.js.

The builder's encoder computes the keys and values of the cross-attention; theirs is the decoder's first step, which
gets the encoder's states. So these nodes move: into a branch of the decoder that is taken while there is no cache.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.contracts import ExportResult
from lora_export.packages import graphs

if TYPE_CHECKING:
    import onnx

STATES, CACHED = "encoder_hidden_states", "use_cache_branch"
_BUILDERS = ("encoder.onnx", "decoder.onnx")
_ENCODED = "encoder_sequence_length_out"
_EVERYTHING = 2**31 - 1  # an end that no cache reaches, for Slice


def is_whisper(export: ExportResult) -> bool:
    return export.graphs == _BUILDERS


def encoder(path: Path) -> "tuple[onnx.ModelProto, dict[str, Path]]":
    """input_features → last_hidden_state, and the folder of each external tensor."""
    model, sources = graphs.opened(path)
    _keep(model, ["hidden_states"])
    _rename(model.graph, {"audio_features": "input_features", "hidden_states": "last_hidden_state"})
    return model, sources


def decoder(encoder_path: Path, path: Path) -> "tuple[onnx.ModelProto, dict[str, Path]]":
    """input_ids, encoder_hidden_states, past_key_values.… and use_cache_branch → logits, present.…

    And the folder of each external initializer: some are the encoder's.
    """
    import onnx
    from onnx import TensorProto, helper

    (model, sources), cross = graphs.opened(path), _cross_attention(encoder_path)
    graph = model.graph
    sources |= {t.name: encoder_path.parent for t in cross.initializer}
    layers = sum(o.name.startswith("present_key_self_") for o in graph.output)
    names = [(what, i) for i in range(layers) for what in ("key", "value")]
    ids = graph.input[0]
    _rename(graph, {ids.name: "ids", **{_past(w, i, "self"): f"used_{w}_{i}" for w, i in names},
                    **{_past(w, i, "cross"): f"cross_{w}_{i}" for w, i in names}})  # fmt: skip
    given = {i.name: i for i in graph.input}
    hidden = helper.make_tensor_value_info(
        STATES, cross.input[0].type.tensor_type.elem_type, ["batch_size", "encoder_sequence_length", _width(cross)]
    )
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"]),
        hidden,
    ]
    before = [
        helper.make_node("Cast", ["input_ids"], ["ids"], to=ids.type.tensor_type.elem_type),
        helper.make_node("Cast", [CACHED], ["cached"], to=TensorProto.INT64),
        helper.make_node("Mul", ["cached", "everything"], ["cache_end"]),
    ]
    outputs = [graph.output[0]]
    for what, i in names:
        old = f"past_key_values.{i}.decoder.{what}"
        # What is handed over where there is no cache yet is a placeholder, in Optimum of one position.
        before.append(helper.make_node("Slice", [old, "start", "cache_end", "axis"], [f"used_{what}_{i}"]))
    before.append(_chosen(cross, names))
    _rename(graph, {f"present_{w}_self_{i}": f"present.{i}.decoder.{w}" for w, i in names})
    own_outputs = {o.name: o for o in graph.output}
    for of, what, i in _in_order(layers):
        past, present = (f"{time}.{i}.{of}.{what}" for time in ("past_key_values", "present"))
        if of == "decoder":
            inputs.append(_as(given[f"used_{what}_{i}"], past))
            outputs.append(own_outputs[present])
        else:
            encoded = given[f"cross_{what}_{i}"]
            inputs.append(_as(encoded, past, {2: _ENCODED}))
            outputs.append(_as(encoded, present, {2: _ENCODED}))
            before.append(helper.make_node("Identity", [f"cross_{what}_{i}"], [present]))
    constants = {"start": [0], "axis": [2], "everything": [_EVERYTHING]}
    initializers = [
        *graph.initializer,
        *cross.initializer,
        *(helper.make_tensor(n, TensorProto.INT64, [1], v) for n, v in constants.items()),
    ]
    inputs.append(helper.make_tensor_value_info(CACHED, TensorProto.BOOL, [1]))
    made = onnx.ModelProto()
    made.CopyFrom(model)
    made.graph.CopyFrom(
        helper.make_graph([*before, *graph.node], graph.name or "decoder", inputs, outputs, initializers)
    )
    return made, sources


def _in_order(layers: int) -> list[tuple[str, str, int]]:
    """The tensors of the cache as Optimum counts them."""
    return [(of, what, i) for i in range(layers) for of in ("decoder", "encoder") for what in ("key", "value")]


def _past(what: str, layer: int, of: str) -> str:
    return f"past_{what}_{of}_{layer}"


def _as(value: "onnx.ValueInfoProto", name: str, axes: "dict[int, str] | None" = None) -> "onnx.ValueInfoProto":
    import onnx

    new = onnx.ValueInfoProto()
    new.CopyFrom(value)
    new.name = name
    for axis, symbol in (axes or {}).items():
        new.type.tensor_type.shape.dim[axis].dim_param = symbol
    return new


def _width(cross: "onnx.GraphProto") -> int:
    return int(cross.input[0].type.tensor_type.shape.dim[2].dim_value)


def _chosen(cross: "onnx.GraphProto", names: list[tuple[str, int]]) -> "onnx.NodeProto":
    """cross_key_0, …: from the cache where there is one, else computed of the encoder's states."""
    from onnx import helper

    kept, made = [], []
    elem = cross.input[0].type.tensor_type.elem_type
    for what, i in names:
        kept.append(helper.make_node("Identity", [f"past_key_values.{i}.encoder.{what}"], [f"kept_{what}_{i}"]))
        made.append(f"cross/present_{what}_cross_{i}")
    ends = [[helper.make_tensor_value_info(n, elem, None) for n in outputs]
            for outputs in ([n.output[0] for n in kept], made)]  # fmt: skip
    return helper.make_node(
        "If",
        [CACHED],
        [f"cross_{what}_{i}" for what, i in names],
        then_branch=helper.make_graph(kept, "from_cache", [], ends[0]),
        else_branch=helper.make_graph(list(cross.node), "from_encoder", [], ends[1]),
    )


def _cross_attention(path: Path) -> "onnx.GraphProto":
    """The encoder's nodes behind hidden_states, which are there called encoder_hidden_states; all else prefixed."""
    import onnx

    model = graphs.load(path)
    hidden = next(o for o in model.graph.output if o.name == "hidden_states")
    kept = _nodes_for(model.graph, [o.name for o in model.graph.output if o is not hidden], {"hidden_states"})
    graph = onnx.GraphProto(node=kept, input=[hidden])
    needed = {n for node in kept for n in node.input}
    graph.initializer.extend(t for t in model.graph.initializer if t.name in needed)
    names = {n for node in kept for n in (*node.input, *node.output) if n}
    _rename(graph, {n: f"cross/{n}" for n in names} | {"hidden_states": STATES})
    return graph


def _keep(model: "onnx.ModelProto", outputs: list[str]) -> None:
    """Take out of a graph what these outputs do not need."""
    graph = model.graph
    nodes = list(_nodes_for(graph, outputs, set()))
    needed = {n for node in nodes for n in node.input}
    ends = [o for o in graph.output if o.name in outputs]
    weights = [t for t in graph.initializer if t.name in needed]
    for field, values in (("node", nodes), ("output", ends), ("initializer", weights)):
        graph.ClearField(field)
        getattr(graph, field).extend(values)
    graph.ClearField("value_info")


def _nodes_for(graph: "onnx.GraphProto", outputs: list[str], given: set[str]) -> "list[onnx.NodeProto]":
    """The nodes that compute `outputs` when `given` is there, in their order."""
    import onnx

    needed, kept = set(outputs), []
    for node in reversed(graph.node):
        if needed & (set(node.output) - given):
            needed |= set(node.input)
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            kept.append(copy)
    return kept[::-1]


def _rename(graph: "onnx.GraphProto", names: dict[str, str]) -> None:
    for node in graph.node:
        for ends in (node.input, node.output):
            for i, name in enumerate(ends):
                ends[i] = names.get(name, name)
    for value in _named(graph):
        value.name = names.get(value.name, value.name)


def _named(graph: "onnx.GraphProto") -> "Iterator[onnx.ValueInfoProto | onnx.TensorProto]":
    yield from graph.input
    yield from graph.output
    yield from graph.value_info
    yield from graph.initializer
