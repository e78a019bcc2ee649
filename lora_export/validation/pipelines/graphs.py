"""An exported pipeline in ONNX Runtime: its graphs called as the models are, and put in their places."""

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch

from lora_export.contracts import Component, ExportedPipeline
from lora_export.errors import ExportError
from lora_export.graph_runs.runs import GraphRun
from lora_export.validation.graphs import weights as graph_weights
from lora_export.validation.graphs.model import GraphModel, shapes_of
from lora_export.validation.graphs.moments import Moments
from lora_export.validation.graphs.numbers import numbers_of
from lora_export.validation.graphs.stated import Stated
from lora_export.validation.pipelines.loading import Modules
from lora_export.validation.pipelines.outputs import Outputs
from lora_export.validation.pipelines.sampling import Call

GRAPH = "model.onnx"
DECODER, ENCODER = "vae_decoder", "vae_encoder"
# What a graph calls the inputs of a model's method.
_ALIASES = {"latent_sample": "z", "sample": "x"}


@dataclass(frozen=True)
class Part:
    """A graph of an exported pipeline. name: of its folder; component: whose model it is."""

    name: str
    path: Path
    component: str


def parts_of(export: ExportedPipeline, components: Mapping[str, Component]) -> list[Part]:
    """The graphs of an export that belong to these components. ExportError where none does."""
    found = []
    for name in components:
        folders = (DECODER, ENCODER) if name == "vae" else (name,)
        for folder in folders:
            alone = len(components) == 1 and (export.folder / GRAPH).is_file()
            path = export.folder / GRAPH if alone else export.folder / folder / GRAPH
            if path.is_file():
                found.append(Part(folder, path, name))
    if not found:
        raise ExportError(
            "the export has no graph of this pipeline",
            where=export.folder,
            expected=", ".join(f"{name}/{GRAPH}" for name in components),
            next_step="lora-export export -m MERGED -o ONNX",
        )
    return found


class Graph:
    """A graph that is called with a model's arguments."""

    def __init__(self, part: Part, provider: str) -> None:
        self.part = part
        self.run = GraphRun(part.path, provider)

    def outputs(self, arguments: Mapping[str, Any]) -> Outputs:
        """By the graph's names, in fp32. ExportError for an input that the model is not given."""
        given = _flat(arguments)
        feed = {}
        for name, told in self.run.signature.inputs.items():
            value = given.get(name, given.get(_ALIASES.get(name, "")))
            if value is None:
                raise ExportError(
                    f"the graph asks for {name}, which the pipeline does not give its {self.part.component}",
                    where=self.part.path,
                    expected=", ".join(n for n, v in given.items() if v is not None),
                )
            array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
            feed[name] = array.astype(told.dtype)
        found = self.run.arrays(feed)
        return {n: torch.from_numpy(np.ascontiguousarray(a)).float() for n, a in found.items()}

    def answers(self, calls: Sequence[Call], like: Sequence[Outputs]) -> list[Outputs]:
        """Of each call, by the model's names of its outputs."""
        return [_renamed(self.outputs(c.arguments), reference) for c, reference in zip(calls, like, strict=True)]


def _flat(arguments: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in arguments.items():
        flat.update(value if isinstance(value, Mapping) else {name: value})
    return flat


def _renamed(found: Outputs, reference: Outputs) -> Outputs:
    """A model with one output has it under any name."""
    if len(reference) == 1 and len(found) == 1:
        return {next(iter(reference)): next(iter(found.values()))}
    return found


class _Answer(tuple[Any, ...]):
    """Outputs by place and by name, as transformers and diffusers give them."""

    def __new__(cls, outputs: Mapping[str, Any]) -> "_Answer":
        made = super().__new__(cls, outputs.values())
        made.__dict__.update(outputs)
        return made


@contextlib.contextmanager
def in_place(pipe: Any, graphs: Sequence[Graph]) -> Iterator[None]:
    """Inside, graphs answer instead of the models of a pipeline of diffusers."""
    with contextlib.ExitStack() as stack:
        for graph in graphs:
            model = getattr(pipe, graph.part.component)
            method = {DECODER: "decode", ENCODER: "encode"}.get(graph.part.name, "forward")
            if method == "encode":
                continue  # no picture is read
            setattr(model, method, MethodType(_stand_in(graph, type(model), method), model))
            stack.callback(delattr, model, method)
        yield


def _stand_in(graph: Graph, cls: Any, method: str) -> Any:
    names = list(inspect.signature(getattr(cls, method)).parameters)[1:]

    def answer(_: Any, *args: Any, **kwargs: Any) -> Any:
        found = graph.outputs({**dict(zip(names, args, strict=False)), **kwargs})
        hidden = sorted(
            (n for n in found if n.startswith("hidden_states.")), key=lambda n: int(n.partition(".")[2])
        )
        outputs: dict[str, Any] = {n: v for n, v in found.items() if n not in hidden}
        if hidden:
            outputs["hidden_states"] = tuple(found[n] for n in hidden)
        if len(outputs) == 1 and not hidden:
            (only,) = outputs.values()
            outputs = {
                "sample" if graph.part.component in ("vae", "unet", "transformer") else n: only for n in outputs
            }
        return _Answer(outputs)

    return answer


def numbers_into(model: Any, graph: Graph, merged: Component, prefix: str) -> tuple[list[Any], bool]:
    """Give a model, in place, the numbers that its graph holds. (checks of these numbers against the merged files;
    whether some are quantized)."""
    expected, shapes = numbers_of(merged.folder), shapes_of(merged.folder)
    beside = graph.part.path.parent
    seen = GraphModel(None, Moments.beside(beside), Stated.beside(beside))
    modules, quantized = Modules(model), False
    for held in graph_weights.read([graph.part.path], shapes):
        seen.judge(held, expected(held), None)
        quantized = quantized or held.quantized is not None
        tensor = _tensor(modules, held.tensor)
        rows = tensor.data.reshape(tensor.shape[0] if tensor.dim() else 1, -1)
        rows[held.start : held.stop] = held.values.reshape(held.stop - held.start, -1)
        tensor.data = rows.reshape(tensor.shape)
    checks = seen.checks(f"{prefix}{graph.part.name}_", "the merged component")
    return checks, quantized and not seen.wrong  # what wrong numbers do is no shift to be allowed for


def _tensor(modules: Modules, name: str) -> torch.Tensor:
    """A parameter, or a buffer that is stored: SD3's positions are one."""
    owner, _, last = name.rpartition(".")
    found: torch.Tensor = getattr(modules.find(owner)[1] if owner else modules.model, last)
    return found
