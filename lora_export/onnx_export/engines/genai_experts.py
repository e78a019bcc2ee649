"""Mixtures of experts in the builder's graphs: one MoE node a layer, whose weights stay as the checkpoint has them.

The CPU's kernel wants the lines of gate and up projections to alternate, and each expert's matrix as (out, in). The
builder computes such weights, which no recipe describes. Here the graph orders the lines itself: from constants
only, so that ONNX Runtime does it once, when it loads the graph.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from lora_export.onnx_export.graphs.files import onnx_type, without_numbers
from lora_export.onnx_export.quantize.blockwise import MICROSOFT, part_names, quantize_graph
from lora_export.onnx_export.quantize.numbers import shapes
from lora_export.onnx_export.quantize.settings import BLOCK_SIZES, GPTQ, Blockwise, chosen
from lora_export.onnx_export.weights.map import Part, Piece, Quantization, Recipe, Weight

_ROUTERS = "*/moe/router/MatMul"


def keep_stored_experts(builder: Any) -> None:
    """builder: the module whose names are the builder's classes."""
    use_unquantized_operator(builder.Model)
    alternate_in_graph(builder.Model)
    turn_in_graph(builder.GPTOSSModel)


def use_unquantized_operator(model: Any) -> None:
    """The builder quantizes experts while it writes a graph, even one in fp32."""
    plain = model.make_moe_init

    def make_moe_init(self: Any) -> None:
        plain(self)
        self.moe_attrs["op_type"] = "MoE"

    model.make_moe_init = make_moe_init


def alternate_in_graph(model: Any) -> None:
    """[gate | up] of each expert to lines that alternate; the builder's biases of zeros are left out."""

    def make_interleaved_swiglu_moe_preprocessing(self: Any, layer: int, moe: Any) -> None:
        import torch

        names = self.make_moe_expert_names(layer)
        stored = moe.experts.gate_up_proj
        experts, lines, _ = stored.shape
        self.make_initializer(stored, f"{names['gate_up_weight']}.stored", to=self.io_dtype)
        apart, turned = f"{names['gate_up_weight']}.apart", f"{names['gate_up_weight']}.alternating"
        _node(self, "Reshape", [f"{names['gate_up_weight']}.stored", _sizes(experts, 2, lines // 2, -1)], apart)
        _node(self, "Transpose", [apart], turned, perm=[0, 2, 1, 3])
        _node(self, "Reshape", [turned, _sizes(experts, lines, -1)], names["gate_up_weight"])
        self.make_initializer(moe.experts.down_proj, names["down_weight"], to=self.io_dtype)
        self.make_initializer(torch.zeros(experts, lines), names["gate_up_bias"], to=self.io_dtype)
        self.make_initializer(torch.zeros(experts, self.hidden_size), names["down_bias"], to=self.io_dtype)

    model.make_interleaved_swiglu_moe_preprocessing = make_interleaved_swiglu_moe_preprocessing


def turn_in_graph(model: Any) -> None:
    """gpt-oss keeps matrices as (in, out), whose lines alternate already."""

    def make_moe_preprocessing(self: Any, layer: int, moe: Any, root_input: str) -> None:
        names = self.make_moe_expert_names(layer)
        for part in ("gate_up", "down"):
            stored, name = getattr(moe.experts, f"{part}_proj"), names[f"{part}_weight"]
            self.make_initializer(stored, f"{name}.stored", to=self.io_dtype)
            _node(self, "Transpose", [f"{name}.stored"], name, perm=[0, 2, 1])
            bias = getattr(moe.experts, f"{part}_proj_bias")
            self.make_initializer(bias, names[f"{part}_bias"], to=self.io_dtype)

    model.make_moe_preprocessing = make_moe_preprocessing


def _sizes(*sizes: int) -> str:
    return f"/model/constants/INT64/{list(sizes)}"


def _node(builder: Any, kind: str, inputs: list[str], output: str, **attributes: Any) -> None:
    name = "/" + output.replace(".", "/")
    builder.make_node(kind, inputs=inputs, outputs=[output], name=f"{name}/{kind}", **attributes)
    builder.make_value(output, builder.io_dtype)


# --- quantized experts -------------------------------------------------------------------------------------


def quantize(model: ir.Model, weights: Sequence[Weight], how: Blockwise, *more: Any) -> list[Weight]:
    """`quantize_graph`, and QMoE in place of MoE: the numbers of each expert's lines in blocks, symmetric.

    Routers stay as they are: a rounded one sends tokens to other experts. So do experts whose lines are no whole
    blocks.
    """
    described = quantize_graph(model, weights, replace(how, keep=(*how.keep, _ROUTERS)), *more)
    mixtures = {str(n.name): n for n in model.graph if n.op_type == "MoE"}
    names = {name: _tensors(node, described) for name, node in mixtures.items()}
    kept, wide = chosen(names, how.keep), chosen(names, how.eight_bits)
    for name, node in mixtures.items():
        if name not in kept:
            own = replace(how, method="int8") if name in wide else how
            described = _quantize_experts(model.graph, node, described, own)
    return described


def _tensors(mixture: ir.Node, weights: Sequence[Weight]) -> frozenset[str]:
    """The checkpoint tensors that hold its experts."""
    known = {w.name: w for w in weights}
    experts = [e for e in (_Experts.read_by(mixture.inputs[i], known) for i in (2, 4)) if e is not None]
    return frozenset(piece.tensor for e in experts for piece in e.weight.recipe.pieces)


def _quantize_experts(graph: ir.Graph, node: ir.Node, weights: list[Weight], how: Blockwise) -> list[Weight]:
    known = {w.name: w for w in weights}
    experts = [_Experts.read_by(node.inputs[i], known) for i in (2, 4)]
    size = _largest_blocks([e.width for e in experts if e is not None], how.block_size)
    if how.method not in ("int4", "int8") or size is None or None in experts:
        return weights
    algorithm = "default" if how.algorithm == GPTQ else how.algorithm  # no node tells what an expert reads
    settings = replace(how.settings, symmetric=True, block_size=size, algorithm=algorithm)
    inputs = [*node.inputs[:2]]
    for each, bias in zip(experts, (node.inputs[3], node.inputs[5]), strict=True):
        assert each is not None
        parts, arrays, new = each.quantized(settings)
        made_here = {p.name for p in parts}
        for value in [v for n in new for v in n.inputs if v is not None and v.name in made_here]:
            graph.register_initializer(value)
        graph.insert_before(node, new)
        inputs += [*arrays, bias]
        weights = [p for w in weights for p in (parts if w is each.weight else [w])]
    bits = int(how.method.removeprefix("int"))
    attributes = [a for a in node.attributes.values() if a.value is not None]
    added = {"expert_weight_bits": bits, "block_size": settings.block_size}
    made = ir.node("QMoE", inputs, added, domain=MICROSOFT, name=f"{node.name}_Q{bits}", num_outputs=1)
    made.attributes.update({a.name: a for a in attributes})
    ir.convenience.replace_nodes_and_values(graph, node, [node], [made], node.outputs, made.outputs)
    for each in experts:
        assert each is not None
        for old in reversed(each.nodes):
            graph.remove(old, safe=True)
        del graph.initializers[each.weight.name]
    return weights


def _largest_blocks(widths: Sequence[int], most: int) -> int | None:
    """The largest size of blocks, up to `most`, that divides all widths."""
    return next((s for s in reversed(BLOCK_SIZES) if s <= most and not any(w % s for w in widths)), None)


@dataclass(frozen=True)
class _Experts:
    """The matrices of all experts. weight: as stored; nodes: what puts it into the order of the operator; turned:
    whether it is stored as (experts, in, out), which `nodes` turn, and not as lines, which `nodes` only order."""

    weight: Weight
    nodes: tuple[ir.Node, ...]
    turned: bool

    @classmethod
    def read_by(cls, value: ir.Value | None, known: Mapping[str, Weight]) -> "_Experts | None":
        nodes: list[ir.Node] = []
        while value is not None and (node := value.producer()) is not None:
            nodes.insert(0, node)
            value = node.inputs[0]
        weight = known.get(str(value.name)) if value is not None else None
        return None if weight is None else cls(weight, tuple(nodes), [n.op_type for n in nodes] == ["Transpose"])

    @property
    def width(self) -> int:
        """Numbers of a line, which share scales in blocks."""
        return self.weight.shape[1 if self.turned else 2]

    def quantized(self, settings: Quantization) -> tuple[list[Weight], list[ir.Value], list[ir.Node]]:
        """Their arrays, as initializers and as what the operator reads, and the nodes between them."""
        parts, arrays, nodes = [], [], []
        for part in shapes(self.width, 1, settings):
            own = self._by_expert(replace(settings, part=part)) if self.turned else self._by_lines(settings, part)
            new = self._in_order(own, [_without_numbers(p) for p in own])
            parts += own
            arrays.append(new[-1].outputs[0])
            nodes += new
        return parts, arrays, nodes

    def _by_lines(self, settings: Quantization, part: Part) -> list[Weight]:
        experts, lines, _ = self.weight.shape
        recipe = replace(self.weight.recipe, transposed=True, quantized=replace(settings, part=part))
        return [self._part(self.weight.name, settings, part, experts * lines, recipe)]

    def _by_expert(self, settings: Quantization) -> list[Weight]:
        (piece,) = self.weight.recipe.pieces
        return [
            self._part(
                f"{self.weight.name}.{i}", settings, settings.part, self.weight.shape[2],
                Recipe((Piece(piece.tensor, piece.start + i, piece.start + i + 1),), quantized=settings),
            )
            for i in range(self.weight.shape[0])
        ]  # fmt: skip

    def _part(self, name: str, settings: Quantization, part: Part, lines: int, recipe: Recipe) -> Weight:
        dtype = self.weight.dtype if part == "scales" else "uint8"
        shape = shapes(self.width, lines, settings)[part]
        return Weight(part_names(name, settings)[part], self.weight.file, dtype, shape, recipe)

    def _in_order(self, own: Sequence[Weight], values: Sequence[ir.Value]) -> list[ir.Node]:
        """Nodes from initializers to (experts, lines, …)."""
        experts, lines = self.weight.shape[0], self.weight.shape[2 if self.turned else 1]
        sizes = ir.tensor(np.array([experts // len(own), lines, -1], np.int64))
        constant = ir.node("Constant", [], {"value": sizes}, name=f"{own[0].name}_sizes")
        shaped = [ir.node("Reshape", [v, constant.outputs[0]], name=f"{v.name}_by_expert") for v in values]
        nodes = [constant, *shaped]
        if self.turned:
            joined = [n.outputs[0] for n in shaped]
            nodes.append(ir.node("Concat", joined, {"axis": 0}, name=f"{own[0].name}_joined"))
        for node in () if self.turned else self.nodes:
            inputs = [nodes[-1].outputs[0], *node.inputs[1:]]
            nodes.append(ir.node(node.op_type, inputs, name=f"{node.name}_{own[0].name}"))
            nodes[-1].attributes.update(node.attributes)
        for i, each in enumerate(nodes):
            each.outputs[0].name, each.outputs[0].type = f"{own[0].name}.{i}", values[0].type
        constant.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        return nodes


def _without_numbers(part: Weight) -> ir.Value:
    tensor = without_numbers(part.name, onnx_type(part.dtype), part.shape)
    return ir.Value(name=part.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
