"""Traces a part of a model to an ONNX graph, on tensors with a shape and no values."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from lora_export.errors import ExportError
from lora_export.onnx_export.engines import trace_patches
from lora_export.onnx_export.engines.dynamo_passes import attention, branches, recurrent, rope
from lora_export.onnx_export.engines.model_without_weights import ModelWithoutWeights, refuse_missing
from lora_export.onnx_export.engines.parts.graph_part import GraphPart
from lora_export.onnx_export.engines.parts.shapes import shapes_only
from lora_export.onnx_export.weights.map import Piece, Recipe

OPSET = 20


def trace(part: GraphPart, model: ModelWithoutWeights) -> tuple[Any, dict[str, Recipe]]:
    """(onnx_ir.Model, recipe of each parameter that is a tensor of the checkpoint).

    These parameters become inputs of the graph: as initializers, passes would ask for their values or compute with
    them. CheckpointError where the part reads a parameter that its folder lacks.
    """
    with attention.cached(part.caches), traceable(model.model), torch.no_grad():
        program, part = _export_first(part, model.model)
    recipes: dict[str, Recipe] = {}
    graph = program.model.graph
    read = {v.name.removeprefix(_Forward.PREFIX) for v in graph.initializers.values() if v.uses()}
    refuse_missing(model, read)
    for value in list(graph.initializers.values()):
        name = value.name.removeprefix(_Forward.PREFIX)
        del graph.initializers[value.name]
        value.name = name
        recipe = _recipe(model, name, tuple(value.shape.numpy()))
        if recipe is not None:
            recipes[name] = recipe
            value.const_value = None
            graph.inputs.append(value)
        else:
            value.const_value = _real(model.model, name, value)
            graph.initializers[name] = value
    _name_axes(graph, part)
    return program.model, recipes


@contextlib.contextmanager
def traceable(model: torch.nn.Module) -> Iterator[None]:
    """Inside, `model` computes the same without asking for values of tensors."""
    with recurrent.replaced(model), rope.traceable(model), trace_patches.applied(model):
        yield


def _recipe(model: ModelWithoutWeights, name: str, shape: tuple[int, ...]) -> Recipe | None:
    if name in model.tensors:
        return Recipe((Piece(model.tensors[name], 0, shape[0] if shape else 1),))
    return model.merged.get(name)


class _Forward(torch.nn.Module):
    """Takes the inputs by position; holds the model for its parameters."""

    PREFIX = "model."

    def __init__(self, part: GraphPart, model: torch.nn.Module) -> None:
        super().__init__()
        self.model, self._run = model, part.run

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._run(*values)


def _export_first(part: GraphPart, model: torch.nn.Module) -> tuple[Any, GraphPart]:
    """The program of a part, or of what it falls back on.

    Raises ExportError where forward takes another path at other sizes than those that were traced.
    """
    try:
        asked = bool(part.pictures or part.longest)
        with branches.noted(asked) as conditions, trace_patches.unchanged(model):
            program = _export(part, model)
        odd = branches.broken(conditions, part)
    except torch.onnx.errors.OnnxExporterError:
        if part.fallback is None:
            raise
        odd = "sizes"
    if odd is None:
        return program, part
    if part.fallback is not None:
        return _export_first(part.fallback, model)
    raise ExportError(f"the forward of {type(model).__name__} does something else at {odd} than in the trace")


@contextlib.contextmanager
def without_values(model: torch.nn.Module) -> Iterator[None]:
    """Inside, parameters and buffers have a shape, a type and no values, and so has everything computed of them."""
    real = _tensors(model)
    with shapes_only():
        _replace(model, {n: torch.empty(t.shape, dtype=t.dtype) for n, t in real.items()})
        try:
            yield
        finally:
            _replace(model, real)


def _export(part: GraphPart, model: torch.nn.Module) -> Any:
    real = _tensors(model)
    with without_values(model):
        fake = _tensors(model)
        values = tuple(torch.zeros(shape, dtype=dtype) for shape, dtype, _ in part.inputs.values())
    _replace(model, fake)
    try:
        return torch.onnx.export(
            _Forward(part, model).eval(),
            values,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            input_names=list(part.inputs),
            output_names=list(part.outputs),
            dynamic_shapes=(tuple(dict(axes) for _, _, axes in part.inputs.values()),),
        )
    finally:
        _replace(model, real)


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.data for name, tensor in named}


def _replace(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put other tensors in the places of parameters and buffers. Shared ones stay shared."""
    made: dict[int, torch.Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for leaves, wrap in ((module._parameters, True), (module._buffers, False)):
            for leaf, old in list(leaves.items()):
                name = f"{prefix}.{leaf}" if prefix else leaf
                if old is None or name not in tensors:
                    continue
                if id(old) not in made:
                    new = tensors[name]
                    made[id(old)] = torch.nn.Parameter(new, requires_grad=False) if wrap else new
                leaves[leaf] = made[id(old)]


def _real(model: torch.nn.Module, name: str, value: Any) -> Any:
    """The values of a buffer, or of a parameter that the checkpoint does not contain as it is."""
    from onnx_ir.tensor_adapters import TorchTensor

    known = _tensors(model)
    return TorchTensor(known[name].contiguous(), name=name) if name in known else value.const_value


def _name_axes(graph: Any, part: GraphPart) -> None:
    """Give dynamic axes Optimum's names; the exporter turns them into formulas."""
    import onnx_ir as ir

    wanted = {n: axes for n, (_, _, axes) in part.inputs.items()} | dict(part.outputs)
    for value in (*graph.inputs, *graph.outputs):
        for axis, name in wanted.get(value.name, {}).items():
            value.shape[axis] = ir.SymbolicDim(name)
