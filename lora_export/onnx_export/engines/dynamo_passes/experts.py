"""Mixtures of experts: the tokens sorted by expert, and a product for each expert's share of them.

Which expert a token goes to is decided when the graph runs. So a graph has every expert, and those that no token
chose multiply nothing. `GroupedMatMul` stands for the products while a model is traced; `expand` puts a Split, a
MatMul for each expert and a Concat in its place, with the weights of each expert as a matrix of its own, which
quantizers and recipes know.
"""

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch

from lora_export.onnx_export.engines.dynamo_passes.traced_graph import TracedGraph, add_weight
from lora_export.onnx_export.weights.map import Piece, Recipe

NAME = "onnxruntime"
_DOMAIN = "lora_export"


def register() -> None:
    """Make `experts_implementation=NAME` known to transformers."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts)


def experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """hidden_states (tokens, size); top_k_index, top_k_weights (tokens, k) → (tokens, size)."""
    tokens, size = hidden_states.shape
    chosen = top_k_index.reshape(-1)
    order = torch.argsort(chosen)
    counts = (chosen[:, None] == torch.arange(module.num_experts, device=chosen.device)).sum(0)
    sorted_experts = chosen[order]

    def product(states: torch.Tensor, name: str) -> torch.Tensor:
        weight = getattr(module, name)
        width = weight.shape[2 if module.is_transposed else 1]
        result = torch.onnx.ops.symbolic(
            f"{_DOMAIN}::GroupedMatMul",
            [states, counts, weight],
            {"turned": int(not module.is_transposed)},
            dtype=states.dtype,
            shape=(states.shape[0], width),
            version=1,
        )
        return result + getattr(module, f"{name}_bias")[sorted_experts] if module.has_bias else result

    states = hidden_states[order // top_k_index.shape[1]]
    if module.has_gate:
        states = module._apply_gate(product(states, "gate_up_proj"))
    else:
        states = module.act_fn(product(states, "up_proj"))
    states = product(states, "down_proj")
    if module.has_post_expert_norm:
        states = module.post_expert_norm(states)
    back = torch.argsort(order)
    states = states[back].reshape(tokens, top_k_index.shape[1], size)
    return (states * top_k_weights[..., None].to(states.dtype)).sum(1)


def expand(graph: TracedGraph) -> None:
    """Replace every GroupedMatMul."""
    for node in graph.nodes("GroupedMatMul"):
        states, counts, weight = node.inputs
        assert states is not None and counts is not None and weight is not None
        turned = bool(node.attributes["turned"].as_int())
        matrices = list(_matrices(graph, weight, turned))
        split = ir.node("Split", [states, counts], {"axis": 0}, num_outputs=len(matrices))
        parts = [ir.node("MatMul", list(pair), num_outputs=1) for pair in zip(split.outputs, matrices, strict=True)]
        joined = ir.node("Concat", [p.outputs[0] for p in parts], {"axis": 0}, num_outputs=1)
        for i, part in enumerate(parts):
            part.name = f"{node.name}_{i}"
        new = [split, *parts, joined]
        for each in new:
            for output in each.outputs:
                output.dtype = node.outputs[0].dtype
        ir.convenience.replace_nodes_and_values(node.graph, node, [node], new, node.outputs, joined.outputs)
    graph.model.graph.opset_imports.pop(_DOMAIN, None)


def _matrices(graph: TracedGraph, weight: ir.Value, turned: bool) -> Iterator[ir.Value]:
    """The matrix (in, out) of each expert, of weights (experts, out, in) if `turned`, else (experts, in, out)."""
    assert weight.shape is not None and weight.dtype is not None
    experts, rows, columns = (int(n) for n in weight.shape.numpy())
    shape = (columns, rows) if turned else (rows, columns)
    recipe = graph.recipes.get(str(weight.name))
    for i in range(experts):
        name = f"{weight.name}.{i}"
        if recipe is not None:
            own = Recipe(pieces=tuple(_pieces(recipe, i, experts, rows)), transposed=turned)
            yield add_weight(graph, name, weight.dtype, shape, own)
        else:
            assert weight.const_value is not None
            values = weight.const_value.numpy()[i]
            value = ir.Value(name=name, const_value=ir.tensor(values.T if turned else values, name=name))
            graph.model.graph.register_initializer(value)
            yield value


def _pieces(recipe: Recipe, expert: int, experts: int, rows: int) -> Iterator[Piece]:
    """Those of an expert. A checkpoint has a tensor of all experts, or matrices that lie below each other."""
    height = sum(p.stop - p.start for p in recipe.pieces)
    start, stop = (expert, expert + 1) if height == experts else (expert * rows, (expert + 1) * rows)
    at = 0
    for piece in recipe.pieces:
        low, high = max(start - at, 0), min(stop - at, piece.stop - piece.start)
        if low < high:
            yield Piece(piece.tensor, piece.start + low, piece.start + high)
        at += piece.stop - piece.start
