"""What each graph of an export is fed with so that its products see calibration texts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, overload

import numpy as np

from lora_export.errors import ExportError, InputError
from lora_export.graph_runs.feeds import Feed, completed, token_feeds
from lora_export.graph_runs.signature import EMBEDS, ENCODER_MASK, IDS, POSITIONS, Array, Signature, read_as
from lora_export.onnx_export.graphs.checks import open_model
from lora_export.onnx_export.quantize.calibration import CalibrationText, Rows, first_of_target
from lora_export.onnx_export.quantize.segments import Shelf

T = TypeVar("T")

_TIME_HEIGHT_WIDTH = 3


@dataclass(frozen=True)
class Stage:
    """A graph and its feeds. tokens: of all feeds together; longest: of one.

    kept: outputs that a later stage reads → what takes their arrays, with the number of the feed.
    """

    graph: Path
    feeds: Sequence[Feed]
    tokens: int
    longest: int
    kept: Mapping[str, Callable[[int, Array], None]] = field(default_factory=dict)


class _Later(Sequence[Feed]):
    """Feeds that are made when they are asked for, of what an earlier stage has left."""

    def __init__(self, count: int, make: Callable[[int], Feed]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, at: int) -> Feed: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Feed]: ...
    def __getitem__(self, at: int | slice) -> Feed | Sequence[Feed]:
        if isinstance(at, slice):
            return [self._make(i) for i in range(self._count)[at]]
        return self._make(range(self._count)[at])


def stages(
    graphs: Sequence[Path], model: Path, text: CalibrationText, tokens: int, scratch: Path
) -> tuple[list[Stage], int, int]:
    """The stages that run one after another, and how many tokens and windows they see.

    graphs: of one export, an encoder's first; model: its Hugging Face folder; tokens: at most so many, unless one
    text has more; scratch: an empty folder for what one stage leaves for the next. A decoder reads running text, an
    encoder a text a line, an encoder-decoder `source` or `source<TAB>target` a line, a vision-language model
    running text without pictures. ExportError for graphs that read anything else, InputError for texts without
    tokens.
    """
    signatures = [Signature.of_model(open_model(graph), graph) for graph in graphs]
    rows = Rows.of(model)
    if len(graphs) == 1 and IDS in signatures[0].inputs:
        return _of_tokens(signatures[0], graphs[0], rows, text, tokens)
    if EMBEDS in signatures[-1].inputs and any(EMBEDS in s.outputs and IDS in s.inputs for s in signatures):
        return _of_embeddings(signatures, graphs, _windows(rows, text, tokens), scratch)
    if len(graphs) > 1 and IDS in signatures[0].inputs and IDS in signatures[1].inputs:
        pairs = rows.pairs(text.lines, first_of_target(model), tokens)
        return _of_pairs(signatures, graphs, _some(pairs, text), scratch)
    raise ExportError(
        f"the graph reads {', '.join(list(signatures[0].inputs)[:4])}, and calibration has only texts",
        where=graphs[0],
        expected="a model that reads texts",
        next_step="--quantizer default, which needs no calibration",
    )


def _windows(rows: Rows, text: CalibrationText, tokens: int) -> list[list[int]]:
    return _some(rows.windows(text.text, tokens), text)


def _some(rows: list[T], text: CalibrationText) -> list[T]:
    if not rows:
        raise InputError("the tokenizer makes no token of the text", where=text.path, expected="a page or more")
    return rows


def _of_tokens(
    signature: Signature, graph: Path, rows: Rows, text: CalibrationText, tokens: int
) -> tuple[list[Stage], int, int]:
    generates = any(value.is_cache for value in signature.inputs.values())
    ids = _windows(rows, text, tokens) if generates else _some(rows.texts(text.lines, tokens), text)
    try:
        feeds = token_feeds(signature, ids)
    except InputError as error:
        raise ExportError(
            error.found,
            where=graph,
            expected="a graph that reads only texts, which calibration is done with",
            next_step="--quantizer default, which needs no calibration",
        ) from None
    total = sum(map(len, ids))
    return [Stage(graph, feeds, total, max(map(len, ids)))], total, len(ids)


def _of_pairs(
    signatures: Sequence[Signature],
    graphs: Sequence[Path],
    pairs: Sequence[tuple[list[int], list[int]]],
    scratch: Path,
) -> tuple[list[Stage], int, int]:
    encoder, decoder = signatures[:2]
    shelf = Shelf(scratch)
    sources = [np.asarray([source], np.int64) for source, _ in pairs]

    def following(number: int) -> Feed:
        states = {read_as(name): shelf.get(number, name) for name in encoder.outputs}
        ids = np.asarray([pairs[number][1]], np.int64)
        return completed(decoder, {ENCODER_MASK: np.ones_like(sources[number]), IDS: ids, **states})

    lengths = [(len(source), len(target)) for source, target in pairs]
    read, written = (sum(one) for one in zip(*lengths, strict=True))
    longest = [max(one) for one in zip(*lengths, strict=True)]
    feeds = [completed(encoder, {IDS: ids}) for ids in sources]
    return (
        [
            Stage(graphs[0], feeds, read, longest[0], _onto(shelf, encoder.outputs)),
            Stage(graphs[1], _Later(len(pairs), following), written, longest[1]),
        ],
        read + written,
        len(pairs),
    )


def _of_embeddings(
    signatures: Sequence[Signature], graphs: Sequence[Path], ids: Sequence[list[int]], scratch: Path
) -> tuple[list[Stage], int, int]:
    at = next(i for i, s in enumerate(signatures) if EMBEDS in s.outputs and IDS in s.inputs)
    embedding, decoder = signatures[at], signatures[-1]
    shelf = Shelf(scratch)

    def following(number: int) -> Feed:
        rows = shelf.get(number, EMBEDS)
        given = {EMBEDS: rows}
        if POSITIONS in decoder.inputs and len(decoder.inputs[POSITIONS].shape) == _TIME_HEIGHT_WIDTH:
            given[POSITIONS] = np.tile(np.arange(rows.shape[1]), (_TIME_HEIGHT_WIDTH, 1, 1))
        return completed(decoder, given)

    total, longest = sum(map(len, ids)), max(map(len, ids))
    feeds = [completed(embedding, {IDS: np.asarray([row], np.int64)}) for row in ids]
    later = _Later(len(ids), following)
    return (
        [
            Stage(graphs[at], feeds, total, longest, _onto(shelf, [EMBEDS])),
            Stage(graphs[-1], later, total, longest),
        ],
        total,
        len(ids),
    )


def _onto(shelf: Shelf, names: Sequence[str] | Mapping[str, object]) -> dict[str, Callable[[int, Array], None]]:
    def keeping(name: str) -> Callable[[int, Array], None]:
        return lambda number, array: shelf.put(number, name, array)

    return {name: keeping(name) for name in names}
