"""Rows of a batch that are padded on the left, in graphs whose attention wants them padded on the right.

GroupQueryAttention is told how many keys a row has, and takes the first ones. onnxruntime-genai pads on the right;
transformers, and so Optimum and transformers.js, on the left. Here tokens turn within their rows, so that the first
one that counts comes first, and hidden states turn back before the head. A row without padding on the left stays as
it is, and so does a single token: its keys lie in the cache without gaps.
"""

import numpy as np
import onnx_ir as ir

_HEAD = "/lm_head/MatMul"
_NAME = "/model/left_padding"
_TOKENS = ("input_ids", "position_ids")
_TYPES = {"Counts": ir.DataType.FLOAT, "Any": ir.DataType.BOOL}


def turn_rows(graph: ir.Graph) -> None:
    """Add the nodes to a decoder of the builder; graphs that attend in another way, or keep states, stay as they
    are: a state has gone through the padding at the end of a row."""
    inputs = {str(v.name): v for v in graph.inputs}
    heads = [n for n in graph if n.name == _HEAD]
    states = any(name.startswith("past.") for name in inputs)
    attends = any(n.op_type == "GroupQueryAttention" for n in graph)
    if states or not heads or not attends or not {"input_ids", "attention_mask"} <= inputs.keys():
        return
    forth, back = _Nodes(graph).turns(inputs["input_ids"], inputs["attention_mask"])
    for name in _TOKENS:
        if name in inputs and len(inputs[name].shape or ()) == 2:
            _Nodes(graph).turn_tokens(inputs[name], forth)
    _Nodes(graph).turn_states(heads[0], back)


class _Nodes:
    """Adds nodes to a graph, which are sorted when it is saved."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph

    def turns(self, ids: ir.Value, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
        """For every place of a row (batch, length): which token comes there, and where a state comes back to.

        Places are counted from the mask, and not from a shape: what is computed of shapes lies in the memory of the
        CPU, and a copy from there to a GPU forbids CUDA graphs.
        """
        length = self._add("Shape", [ids], "Length", start=1, end=2)
        last, axis = self._number("Last", [np.iinfo(np.int64).max]), self._number("Axis", [1])
        now = self._add("Slice", [mask, self._add("Neg", [length], "Neg"), last, axis], "Now")
        counts = self._add("Cast", [now], "Counts", to=int(ir.DataType.FLOAT))
        first = self._add("ArgMax", [counts], "First", axis=1, keepdims=1)  # of equal ones, the first
        ones = self._add("Cast", [self._add("Equal", [now, now], "Any")], "Ones", to=int(ir.DataType.INT64))
        size = self._add("ReduceSum", [ones, axis], "Size", keepdims=1)
        begun = self._add("CumSum", [ones, self._number("Row", 1)], "Begun")
        places = self._add("Sub", [begun, ones], "Places")
        forth = self._add("Mod", [self._add("Add", [places, first], "Add"), size], "Forth")
        before = self._add("Sub", [self._add("Add", [places, size], "Behind"), first], "Sub")
        return forth, self._add("Mod", [before, size], "Back")

    def turn_tokens(self, tokens: ir.Value, places: ir.Value) -> None:
        readers = [u for u in tokens.uses() if not str(u.node.name).startswith(_NAME)]
        turned = self._add("GatherElements", [tokens, places], f"Turned/{tokens.name}", axis=1)
        turned.shape = tokens.shape
        for reader in readers:
            reader.node.replace_input_with(reader.idx, turned)

    def turn_states(self, head: ir.Node, places: ir.Value) -> None:
        states = head.inputs[0]
        assert states is not None
        rows = self._add("Unsqueeze", [places, self._number("Behind_all", [-1])], "Rows")
        turned = self._add("GatherND", [states, rows], "Turned/states", batch_dims=1)
        turned.type, turned.shape = states.type, states.shape
        head.replace_input_with(0, turned)

    def _number(self, name: str, value: int | list[int]) -> ir.Value:
        return self._add("Constant", [], f"Constant/{name}", value=ir.tensor(np.array(value, np.int64)))

    def _add(self, kind: str, inputs: list[ir.Value], what: str, **attributes: object) -> ir.Value:
        name = f"{_NAME}/{what}"
        node = ir.node(kind, inputs, attributes, name=name, outputs=[ir.val(f"{name}/output_0")])
        node.outputs[0].type = ir.TensorType(_TYPES.get(what, ir.DataType.INT64))
        self._graph.append(node)
        return node.outputs[0]
