"""Run by dynamo.py in a process of its own: torch's dynamo exporter on one request.

Besides the graphs, it writes the file that the request names as `result`: kind, task and file names of the graphs.
"""

import json
import sys
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from lora_export.errors import ExportError


def main(request: dict[str, Any]) -> None:
    warnings.simplefilter("ignore")  # torch warns about requested axes and names
    from lora_export.onnx_export.engines.dynamo_passes import attention, experts

    attention.register()
    experts.register()
    write(request, lambda: _parts(request))


def write(
    request: dict[str, Any],
    parts: Callable[[], tuple[Any, Any]],
    positions: Collection[str] = (),
    finish: Callable[[Any], None] = lambda graph: None,
) -> None:
    """Trace what `parts` gives (a model without weights, and what is traced of it), and write its graphs.

    positions: inputs of which sines and cosines are computed, in fp32 always; finish: a last pass over each graph.
    """
    import onnx_ir as ir

    from lora_export.onnx_export.engines.dynamo_passes import experts, passes, tracing
    from lora_export.onnx_export.engines.dynamo_passes.halving import halve
    from lora_export.onnx_export.engines.dynamo_passes.kept_wide import kept_by
    from lora_export.onnx_export.engines.dynamo_passes.traced_graph import TracedGraph
    from lora_export.onnx_export.graphs import files as graph_files
    from lora_export.onnx_export.quantize.settings import Blockwise

    try:
        model, traced = parts()
        programs = [tracing.trace(part, model) for part in traced.parts]
    except ExportError as reason:
        raise ExportError(
            f"the model cannot be traced to a graph: {reason.found}",
            where=request["model"],
            next_step="use the merged folder with transformers, vLLM or TGI as it is: lora-export merge",
        ) from reason
    graphs, constants = {}, {}
    weights: dict[tuple[str, str], Any] = {}
    plain: dict[str, set[str]] = {}  # data file → weights that graphs with it read as they are
    tied = _tied(programs)
    for part, program in zip(traced.parts, programs, strict=True):
        shared = frozenset(plain.setdefault(part.data, set()))
        graph = TracedGraph(*program, shared)
        experts.expand(graph)
        passes.run(graph, request["optimize"], pack=not request["quantized"])
        _drop_unread_inputs(graph.model.graph)
        if request["precision"] in _HALVES:
            half = ir.DataType[_HALVES[request["precision"]]]
            halve(graph.model, half, kept_by(model.model, half), positions)
        finish(graph)
        own = []
        for weight, value in _weights(graph, part.data):
            own.append(weight)
            if value is not None:
                constants[part.data, weight.name] = value
        plain[part.data] |= {weight.name for weight in own}
        graphs[part.file] = graph.model
        if request["quantized"]:
            own = _quantized(graph.model, own, Blockwise(**request["quantized"]), tied, len(programs) == 1)
        weights |= {(part.data, weight.name): weight for weight in own}
    data_files = {part.file: part.data for part in traced.parts}
    graph_files.save(Path(request["output"]), graphs, list(weights.values()), constants, data_files)
    made = {"kind": traced.kind, "task": traced.task, "graphs": list(graphs)}
    Path(request["output"], request["result"]).write_text(json.dumps(made), encoding="utf-8")


def _tied(programs: Sequence[Any]) -> frozenset[str]:
    """Weights that one graph looks rows up in and another multiplies by: both read the same parts of them."""
    looked_up, other = set(), set()
    for model, recipes in programs:
        for value in model.graph.inputs:
            if value.name in recipes:
                kinds = {user.op_type for user, _ in value.uses()}
                looked_up |= {value.name} if "Gather" in kinds else set()
                other |= {value.name} if kinds - {"Gather"} else set()
    return frozenset(looked_up & other)


def _quantized(model: Any, weights: Sequence[Any], how: Any, tied: frozenset[str], alone: bool) -> list[Any]:
    """The weights of a graph in quantized parts; as they are in one of several graphs that has no product."""
    from lora_export.onnx_export.quantize.blockwise import quantize_graph

    try:
        return quantize_graph(model, weights, how, tied)
    except ExportError:
        if alone:
            raise
        return list(weights)


def _parts(request: dict[str, Any]) -> tuple[Any, Any]:
    """(model without weights, what is traced of it)."""
    from lora_export.onnx_export.engines.parts import parts_of

    folder, architecture, optimize = Path(request["model"]), request["architecture"], request["optimize"]
    model = _load(folder, architecture, optimize)
    try:
        return model, parts_of(model.model, request["task"])
    except (RuntimeError, ExportError):  # some layers do not ask for attention, and cannot read its masks
        if optimize != "full":
            raise
    model = _load(folder, architecture, "none")
    return model, parts_of(model.model, request["task"])


_HALVES = {"fp16": "FLOAT16", "bf16": "BFLOAT16"}


def _has_alibi(folder: Path) -> bool:
    return bool(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("alibi"))


def _load(folder: Path, architecture: str, optimize: str) -> Any:
    """The model without large weights, with attention as one operator if the architecture supports that."""
    import transformers

    from lora_export.onnx_export.engines.dynamo_passes import attention, experts
    from lora_export.onnx_export.engines.model_without_weights import load_without_weights
    from lora_export.onnx_export.engines.parts import sentence

    cls = getattr(transformers, architecture)
    # Do not rely on the model's own flag: BART's is off, although it asks the interface.
    asks = optimize == "full" and hasattr(sys.modules[cls.__module__], "ALL_ATTENTION_FUNCTIONS")
    attends = attention.NAME if asks else "eager"
    if cls.__name__.startswith("Falcon") and cls._supports_sdpa and _has_alibi(folder):
        attends = "sdpa"  # its other way adds the bias twice
    model = load_without_weights(cls, folder, attn_implementation=attends, experts_implementation=experts.NAME)
    text: Any = model.model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    if cls.__name__.endswith("ForSequenceClassification") and getattr(text, "pad_token_id", 0) is None:
        # Such a classifier refuses several rows. A graph reads the last token of each, as it does of one.
        text.pad_token_id = -1
    return sentence.attach(model, folder)


def _drop_unread_inputs(graph: Any) -> None:
    """A model may take an input that it does not look at: Whisper a mask of its sounds."""
    for value in [v for v in graph.inputs if not v.uses() and not v.is_graph_output()]:
        graph.inputs.remove(value)


def _weights(graph: Any, data: str) -> Any:
    """Yields (weight, its value if it is a constant) for everything that goes into the data file."""
    from lora_export.onnx_export.graphs.files import INLINE, map_type
    from lora_export.onnx_export.weights.map import Recipe, Weight

    for name, value in graph.model.graph.initializers.items():
        tensor, recipe = value.const_value, graph.recipes.get(name)
        if recipe is None and tensor.nbytes < INLINE:
            continue
        shape = tuple(int(n) for n in tensor.shape.numpy())
        weight = Weight(name, data, map_type(tensor.dtype), shape, recipe or Recipe())
        yield weight, None if recipe else tensor.numpy()
