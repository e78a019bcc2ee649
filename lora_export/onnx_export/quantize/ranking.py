"""In which order the weights of a quantized export get more bits: those that the adapter changes first, then the
others, both by the damage per byte that their rounding does."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_export.contracts import Progress
from lora_export.graph_runs.feeds import Feed, token_feeds
from lora_export.graph_runs.signature import Signature
from lora_export.onnx_export import records
from lora_export.onnx_export.graphs.checks import open_model
from lora_export.onnx_export.quantize import calibration
from lora_export.onnx_export.quantize.sensitivity import Damage, choose_kept
from lora_export.onnx_export.weights import map as weights_map

TOKENS = 512  # of the texts on which damage is measured: each group of weights costs a run over them


@dataclass(frozen=True)
class Group:
    """Weights that get more bits together. tensors: of the checkpoint, that they are made of; nodes: of the graph,
    that multiply by them; touched: whether the adapter changes one of them; nbytes: of the group in the export, as
    int8 and unquantized."""

    nodes: tuple[str, ...]
    tensors: tuple[str, ...]
    touched: bool
    nbytes: int
    in_int8: int
    unquantized: int


def rank(
    made: Path,
    in_int8: Path,
    plain: Path,
    model: Path,
    touched: Collection[str],
    texts: Path | None,
    progress: Progress,
) -> tuple[Group, ...]:
    """The groups of weights that `made` holds in its lowest precision, in the order in which to raise them.

    made: a quantized export; in_int8: the same with all products in int8 (`made` itself, if that is its precision);
    plain: the same in fp32; model: a folder with the tokenizer; touched: tensors of the checkpoint that the adapter
    changes; texts: a file to measure on, by default the built-in page of calibration. ExportError for a graph that
    reads no texts, InputError for texts that cannot be read.
    """
    record, fp32 = records.read_record(made), records.read_record(plain)
    assert record.quantization is not None
    graph = plain / fp32.graphs[0]
    damages = choose_kept(
        graph,
        record.quantization,
        _feeds(graph, model, texts, record.kind == "decoder"),
        logits="logits" if record.kind == "decoder" else None,
        eight_bits=record.precision != "int8",
        made=made,
        progress=progress,
    )
    low = {t for t, method in _methods(made) if method == record.quantization.method}
    groups = [_group(d, made, in_int8, plain, touched) for d in damages if low & {*d.tensors}]
    return tuple(sorted(groups, key=lambda g: not g.touched))


def _feeds(graph: Path, model: Path, texts: Path | None, running: bool) -> list[Feed]:
    """running: whether the model reads running text; an encoder gets a text a line."""
    text, rows = calibration.read(texts), calibration.Rows.of(model)
    ids = rows.windows(text.text, TOKENS) if running else rows.texts(text.lines, TOKENS)
    return list(token_feeds(Signature.of_model(open_model(graph), graph), ids))


def _methods(folder: Path) -> Iterator[tuple[str, str]]:
    """The tensors of quantized weights, with the method of each."""
    for weight in weights_map.read(folder).weights:
        if weight.recipe.quantized is not None:
            yield from ((p.tensor, weight.recipe.quantized.method) for p in weight.recipe.pieces)


def _group(damage: Damage, made: Path, in_int8: Path, plain: Path, touched: Collection[str]) -> Group:
    own = {*damage.tensors}
    sizes = (_nbytes(folder, own) for folder in (made, in_int8, plain))
    return Group(damage.nodes, damage.tensors, not own.isdisjoint(touched), *sizes)


def _nbytes(folder: Path, tensors: Collection[str]) -> int:
    """Bytes of the weights of an export that are made of these tensors."""
    weights = weights_map.read(folder).weights
    return sum(w.nbytes for w in weights if any(p.tensor in tensors for p in w.recipe.pieces))
