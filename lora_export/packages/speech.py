"""Whisper as the genai builder exports it, with the names and inputs of Optimum and transformers.js.

The builder's encoder computes the keys and values of the cross-attention; theirs does that in the decoder's first
step, which gets the encoder's states. So these nodes move into a branch of the decoder that runs while there is no
cache.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lora_export.contracts import ExportResult
from lora_export.packages import graphs

STATES, CACHED = "encoder_hidden_states", "use_cache_branch"
_BUILDERS = ("encoder.onnx", "decoder.onnx")
_ENCODED = "encoder_sequence_length_out"
_EVERYTHING = 2**31 - 1  # for Slice: beyond the end of any cache


def is_whisper(export: ExportResult) -> bool:
    return export.graphs == _BUILDERS


def cache_switch() -> ir.Value:
    """The input that says whether there is a cache."""
    return ir.val(CACHED, ir.DataType.BOOL, [1])


def encoder(path: Path) -> ir.Model:
    """input_features → last_hidden_state."""
    model = graphs.load(path)
    graph, values = model.graph, _by_name(model.graph)
    states = values["hidden_states"]
    graph.outputs[:] = [states]
    kept = set(graphs.nodes_for(graph, [states]))
    graph.remove([node for node in graph if node not in kept], safe=True)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
    values["audio_features"].name, states.name = "input_features", "last_hidden_state"
    graphs.forget_types(model)
    return model


def decoder(encoder_path: Path, path: Path) -> ir.Model:
    """input_ids, encoder_hidden_states, past_key_values.… and use_cache_branch → logits, present.…"""
    model = graphs.load(path)
    graph, values = model.graph, _by_name(model.graph)
    layers = sum(name.startswith("present_key_self_") for name in values)
    pairs = [(what, i) for i in range(layers) for what in ("key", "value")]
    states, cross, weights = _cross_attention(encoder_path, pairs)
    switch, old_ids = cache_switch(), graph.inputs[0]
    ids = ir.val("input_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
    start, axis, everything = constants = [
        ir.val(name, const_value=ir.tensor(np.array([value], np.int64), name=name))
        for name, value in (("start", 0), ("axis", 2), ("everything", _EVERYTHING))
    ]
    cast = _node("Cast", [ids], "ids", {"to": _dtype(old_ids).value})
    cached = _node("Cast", [switch], "cached", {"to": ir.DataType.INT64.value})
    end = _node("Mul", [cached.outputs[0], everything], "cache_end")
    before = [cast, cached, end]
    old_ids.replace_all_uses_with(cast.outputs[0])
    ends = {v.name: v for v in (ids, states, graph.outputs[0])}
    for what, i in pairs:
        # Without a cache, callers pass a placeholder, which has one position in Optimum.
        old = values[f"past_{what}_self_{i}"]
        past = _like(old, f"past_key_values.{i}.decoder.{what}")
        before.append(_node("Slice", [past, start, end.outputs[0], axis], f"used_{what}_{i}"))
        old.replace_all_uses_with(before[-1].outputs[0])
        present = values[f"present_{what}_self_{i}"]
        present.name = f"present.{i}.decoder.{what}"
        ends |= {past.name: past, present.name: present}
    pasts = [_like(values[f"past_{w}_cross_{i}"], f"past_key_values.{i}.encoder.{w}", _ENCODED) for w, i in pairs]
    chosen = _chosen(switch, pasts, cross, pairs)
    before.append(chosen)
    for (what, i), past, value in zip(pairs, pasts, chosen.outputs, strict=True):
        old = values[f"past_{what}_cross_{i}"]
        old.replace_all_uses_with(value)
        present = _like(old, f"present.{i}.encoder.{what}", _ENCODED)
        before.append(ir.node("Identity", [value], outputs=[present]))
        ends |= {past.name: past, present.name: present}
    caches = [(i, of, what) for i in range(layers) for of in ("decoder", "encoder") for what in ("key", "value")]
    kinds = [f"{i}.{of}.{what}" for i, of, what in caches]  # in Optimum's order
    graph.inputs[:] = [ids, states, *(ends[f"past_key_values.{kind}"] for kind in kinds), switch]
    graph.outputs[:] = [graph.outputs[0], *(ends[f"present.{kind}"] for kind in kinds)]
    for value in (*weights, *constants):
        graph.register_initializer(value)
    graph.insert_before(graph[0], before)
    graphs.forget_types(model)
    return model


def _by_name(graph: ir.Graph) -> dict[str, ir.Value]:
    return {str(value.name): value for value in (*graph.inputs, *graph.outputs)}


def _node(
    kind: str, inputs: Sequence[ir.Value], output: str, attributes: Mapping[str, int] | None = None
) -> ir.Node:
    return ir.node(kind, inputs, attributes, outputs=[ir.val(output)])


def _dtype(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None
    return value.dtype


def _like(value: ir.Value, name: str, length: str | None = None) -> ir.Value:
    """Another value of the same type and shape. length: another name for its axis 2."""
    assert value.shape is not None
    shape = ir.Shape(value.shape)
    if length is not None:
        shape[2] = length
    return ir.Value(name=name, type=value.type, shape=shape)


def _cross_attention(path: Path, pairs: Sequence[tuple[str, int]]) -> tuple[ir.Value, ir.Graph, list[ir.Value]]:
    """The encoder's nodes behind its states as a branch, which returns the keys and values of `pairs`.

    Also the states, as an input, and the weights that the branch reads. All names inside get a prefix.
    """
    graph = graphs.load(path).graph
    hidden, *_ = (value for value in graph.outputs if value.name == "hidden_states")
    values = _by_name(graph)
    ends = [values[f"present_{what}_cross_{i}"] for what, i in pairs]
    nodes = graphs.nodes_for(graph, ends, [hidden])
    assert hidden.shape is not None
    sizes = ["batch_size", "encoder_sequence_length", hidden.shape[2]]
    states = ir.Value(name=STATES, type=hidden.type, shape=ir.Shape(sizes))
    graph.outputs.clear()
    hidden.replace_all_uses_with(states)
    graph.remove(nodes)
    read = {value for node in nodes for value in node.inputs}
    weights = [graph.initializers.pop(name) for name, value in list(graph.initializers.items()) if value in read]
    for value in (*weights, *(value for node in nodes for value in node.outputs)):
        value.name = f"cross/{value.name}" if value.name else value.name
    for value in ends:
        value.shape = None
    return states, ir.Graph([], ends, nodes=nodes, name="from_encoder"), weights


def _chosen(
    switch: ir.Value, pasts: Sequence[ir.Value], cross: ir.Graph, pairs: Sequence[tuple[str, int]]
) -> ir.Node:
    """cross_key_0, …: from the cache if there is one, else computed from the encoder's states."""
    kept = [_node("Identity", [past], f"kept_{what}_{i}") for (what, i), past in zip(pairs, pasts, strict=True)]
    ends = [node.outputs[0] for node in kept]
    for value, past in zip(ends, pasts, strict=True):
        value.type = past.type
    branches = {"then_branch": ir.Graph([], ends, nodes=kept, name="from_cache"), "else_branch": cross}
    return ir.node("If", [switch], branches, outputs=[ir.val(f"cross_{what}_{i}") for what, i in pairs])
