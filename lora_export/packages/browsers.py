"""Operators that ONNX Runtime's builds for browsers lack, as others that they have and that compute the same.

What the builds of onnxruntime-web 1.30 have: GatherBlockQuantized on WebGPU only, not on WASM in the build that has
both; Attention and MultiHeadAttention on WebGPU without a mask of keys, and without a direction. A bias of the
attention says both, and every build adds it.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

_MICROSOFT = "com.microsoft"
_BIAS = 5  # the input of Attention and of MultiHeadAttention that is added to the products of queries and keys
_MASK = {"Attention": 3, "MultiHeadAttention": 4}
_PAST_KEY = 6  # of MultiHeadAttention: (rows, heads, length, size)
_FILTER = -10_000.0  # what ONNX Runtime adds where a mask is 0, unless mask_filter_value is given


def adapt(model: ir.Model) -> None:
    """Replace in place what a browser cannot run; nothing else changes."""
    for graph in (model.graph, *model.graph.subgraphs()):
        biases: dict[tuple[ir.Value, object, float], ir.Value] = {}
        for node in list(graph):
            if node.domain != _MICROSOFT:
                continue
            if node.op_type == "GatherBlockQuantized":
                _spell_out_lookup(node)
            elif node.op_type in _MASK:
                _mask_by_bias(node, biases)


class _Chain:
    """Nodes to insert before one, whose names begin with its name."""

    def __init__(self, before: ir.Node) -> None:
        self.nodes: list[ir.Node] = []
        self._name = f"{before.name or before.outputs[0].name}/browser"

    def add(self, kind: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        name = f"{self._name}/{len(self.nodes)}"
        made = ir.node(kind, inputs, attributes or None, outputs=[ir.val(name)], name=name)
        self.nodes.append(made)
        return made.outputs[0]

    def constant(self, values: object, dtype: type[np.generic] = np.int64) -> ir.Value:
        return self.add("Constant", value=ir.tensor(np.array(values, dtype)))


# --- embeddings in blocks ----------------------------------------------------------------------------------------


def _spell_out_lookup(node: ir.Node) -> None:
    """Rows of a quantized table: looked up as bytes, then (number − zero point) · scale, in blocks.

    Tables of other layouts than this project writes stay as they are.
    """
    found = {name: value.as_int() for name, value in node.attributes.items()}
    bits, block = found.get("bits", 4), found.get("block_size", 128)
    table, ids, scales, zeros = [*node.inputs, None][:4]
    assert table is not None and ids is not None and scales is not None
    dtype, shape = _dtype(scales), scales.const_value.shape if scales.const_value is not None else scales.shape
    usual = bits in (4, 8) and found.get("gather_axis", 0) == 0 and found.get("quantize_axis", 1) in (1, -1)
    if not usual or dtype is None or shape is None or len(shape) != 2 or _is_int4(table):
        return
    blocks = int(shape[1])
    chain = _Chain(node)
    size = chain.add("Shape", ids)

    def numbers(rows: ir.Value, *last: int) -> ir.Value:
        """Of bytes, looked up: (…, *last)."""
        read = chain.add("Cast", chain.add("Gather", rows, ids, axis=0), to=dtype.value)
        if bits == 4:  # the lower half comes first
            high = chain.add("Floor", chain.add("Mul", read, chain.constant(1 / 16, dtype.numpy().type)))
            low = chain.add("Sub", read, chain.add("Mul", high, chain.constant(16, dtype.numpy().type)))
            last_axis = chain.constant([-1])
            halves = [chain.add("Unsqueeze", half, last_axis) for half in (low, high)]
            read = chain.add("Concat", *halves, axis=-1)
        return chain.add("Reshape", read, chain.add("Concat", size, chain.constant(last), axis=0))

    if zeros is None:
        zero = chain.constant(2 ** (bits - 1), dtype.numpy().type)
    else:
        stored = -(-blocks // 2) * 2 if bits == 4 else blocks
        zero = numbers(zeros, stored, 1)
        if stored != blocks:
            bounds = [chain.constant([at]) for at in (0, blocks, -2)]
            zero = chain.add("Slice", zero, *bounds)
    scale = chain.add("Unsqueeze", chain.add("Gather", scales, ids, axis=0), chain.constant([-1]))
    exact = chain.add("Mul", chain.add("Sub", numbers(table, blocks, block), zero), scale)
    chain.add("Reshape", exact, chain.add("Concat", size, chain.constant([blocks * block]), axis=0))
    made = chain.nodes
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], made, node.outputs, made[-1].outputs)


def _is_int4(table: ir.Value) -> bool:
    return _dtype(table) in (ir.DataType.INT4, ir.DataType.UINT4)


def _dtype(value: ir.Value) -> ir.DataType | None:
    return value.const_value.dtype if value.const_value is not None else value.dtype


# --- masks -------------------------------------------------------------------------------------------------------


def _mask_by_bias(node: ir.Node, known: dict[tuple[ir.Value, object, float], ir.Value]) -> None:
    """Give a node of attention its mask of keys, and its direction, as a bias.

    known: the biases of masks that other nodes of the graph have already, by mask, query's length and filter.
    """
    inputs = [*node.inputs, *[None] * (_BIAS + 1)][: max(len(node.inputs), _BIAS + 1)]
    place, query = _MASK[node.op_type], inputs[0]
    assert query is not None
    mask, one_way = inputs[place], _one_way(node)
    raw = mask is not None and mask.shape is not None and len(mask.shape) == 2
    if not (raw or one_way) or (mask is not None and not raw) or _packed(node):
        return
    chain = _Chain(node)
    biases = [inputs[_BIAS]] if inputs[_BIAS] is not None else []
    if mask is not None:
        given = node.attributes.get("mask_filter_value")
        filtered = given.as_float() if given else _FILTER
        length = query.shape[1] if query.shape is not None else node
        key = (mask, length if isinstance(length, int) else str(length), filtered)
        if key not in known:
            known[key] = _of_mask(chain, mask, query, filtered)
        biases.append(known[key])
    if one_way:
        biases.append(_of_direction(chain, query, inputs[_PAST_KEY] if len(inputs) > _PAST_KEY else None))
        del node.attributes["unidirectional"]
    _insert(node, chain, place, biases)


def _insert(node: ir.Node, chain: _Chain, place: int, biases: Sequence[ir.Value | None]) -> None:
    total, *others = [b for b in biases if b is not None]
    for other in others:
        total = chain.add("Add", total, other)
    assert node.graph is not None
    node.graph.insert_before(node, chain.nodes)
    if len(node.inputs) <= _BIAS:
        node.resize_inputs(_BIAS + 1)
    node.replace_input_with(place, None)
    node.replace_input_with(_BIAS, total)


def _one_way(node: ir.Node) -> bool:
    given = node.attributes.get("unidirectional")
    return node.op_type == "MultiHeadAttention" and given is not None and bool(given.as_int())


def _packed(node: ir.Node) -> bool:
    """Whether keys and values are packed into one input, which has another shape."""
    return any(v is not None and v.shape is not None and len(v.shape) > 4 for v in node.inputs[:3])


def _lengths(chain: _Chain, query: ir.Value) -> ir.Value:
    """(1,): the length of the query, which is (rows, length, size) or (rows, heads, length, size)."""
    return chain.add("Shape", query, start=-2, end=-1)


def _of_mask(chain: _Chain, mask: ir.Value, query: ir.Value, filtered: float) -> ir.Value:
    """(rows, 1, query's length, keys), 0 where the mask (rows, keys) is above 0, and `filtered` elsewhere."""
    allowed = chain.add("Greater", mask, chain.constant(0, np.int32))
    added = _where(chain, query, allowed, filtered)
    spread = chain.add("Unsqueeze", added, chain.constant([1, 2]))
    one = chain.constant([1])
    shape = chain.add("Concat", one, one, _lengths(chain, query), one, axis=0)
    return chain.add("Expand", spread, shape)


def _of_direction(chain: _Chain, query: ir.Value, past: ir.Value | None) -> ir.Value:
    """(1, 1, query's length, keys), 0 up to each query's own place, and the lowest number behind it."""
    zero, one, axis = chain.constant(0), chain.constant(1), chain.constant([0])
    length = chain.add("Squeeze", _lengths(chain, query), axis)
    before = zero if past is None else chain.add("Squeeze", chain.add("Shape", past, start=2, end=3), axis)
    end = chain.add("Add", before, length)
    keys = chain.add("Range", zero, end, one)
    places = chain.add("Unsqueeze", chain.add("Range", before, end, one), chain.constant([1]))
    allowed = chain.add("LessOrEqual", keys, places)
    dtype = _dtype(query) or ir.DataType.FLOAT16  # the lowest number of both types hides a key
    added = _where(chain, query, allowed, float(np.finfo(dtype.numpy()).min))
    return chain.add("Unsqueeze", added, chain.constant([0, 1]))


def _where(chain: _Chain, query: ir.Value, allowed: ir.Value, otherwise: float) -> ir.Value:
    """0 or `otherwise`, of the query's type."""
    dtype = _dtype(query)
    kind = np.float32 if dtype is None else dtype.numpy().type
    added = chain.add("Where", allowed, chain.constant(0, kind), chain.constant(otherwise, kind))
    return added if dtype is not None else chain.add("CastLike", added, query)


def remaining(model: ir.Model) -> Iterator[str]:
    """Names of nodes that a browser cannot run, on WASM or on WebGPU."""
    for graph in (model.graph, *model.graph.subgraphs()):
        for node in graph:
            if node.domain == _MICROSOFT and (node.op_type == "GatherBlockQuantized" or _masked(node)):
                yield str(node.name)


def _masked(node: ir.Node) -> bool:
    place = _MASK.get(node.op_type)
    if place is None:
        return False
    return _one_way(node) or (len(node.inputs) > place and node.inputs[place] is not None)
