"""What each graph of an export is fed with so that its products see calibration texts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, overload

import numpy as np

from lora_export.errors import ExportError, InputError
from lora_export.graph_runs.feeds import Feed, completed, token_feeds
from lora_export.graph_runs.signature import (
    AUDIO,
    EMBEDS,
    ENCODER_MASK,
    IDS,
    MASK,
    POSITIONS,
    SPECTRUM,
    WAVE,
    Array,
    Signature,
    read_as,
)
from lora_export.onnx_export.graphs.checks import open_model
from lora_export.onnx_export.quantize.calibration import CalibrationText, Rows, first_of_target
from lora_export.onnx_export.quantize.segments import Shelf
from lora_export.onnx_export.quantize.speech import Clips, heard

T = TypeVar("T")

HEARD = {AUDIO, SPECTRUM, WAVE}
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
    graphs: Sequence[Path], model: Path, given: CalibrationText | Clips, tokens: int, scratch: Path
) -> tuple[list[Stage], int, int]:
    """The stages that run one after another, and how many tokens and windows they see.

    graphs: of one export, an encoder's first; model: its Hugging Face folder; tokens: at most so many, unless one
    text has more; scratch: an empty folder for what one stage leaves for the next. A decoder reads running text, an
    encoder a text a line, an encoder-decoder `source` or `source<TAB>target` a line, or clips if it hears, and a
    vision-language model running text without pictures. ExportError for graphs that read anything else, InputError
    for texts without tokens.
    """
    signatures = [Signature.of_model(open_model(graph), graph) for graph in graphs]
    first, last = signatures[0].inputs, signatures[-1].inputs
    decodes = len(graphs) > 1 and IDS in signatures[1].inputs
    if decodes and first.keys() & HEARD:
        if isinstance(given, Clips):
            return _of_pairs(signatures, graphs, *_spoken(model, given), scratch)
        raise _nothing_to_read(graphs[0], first, "a folder of WAV files with transcripts", "FOLDER")
    if not isinstance(given, CalibrationText):
        raise _nothing_to_read(graphs[0], first, "a text file for a model that reads texts", "FILE")
    rows = Rows.of(model)
    if len(graphs) == 1 and IDS in first:
        return _of_tokens(signatures[0], graphs[0], rows, given, tokens)
    if EMBEDS in last and any(EMBEDS in s.outputs and IDS in s.inputs for s in signatures):
        return _of_embeddings(signatures, graphs, _windows(rows, given, tokens), scratch)
    if decodes and IDS in first:
        pairs = _some(rows.pairs(given.lines, first_of_target(model), tokens), given)
        sources = [{IDS: np.asarray([source], np.int64)} for source, _ in pairs]
        return _of_pairs(signatures, graphs, sources, [target for _, target in pairs], scratch)
    raise _nothing_to_read(graphs[0], first, "a model that reads texts")


def _nothing_to_read(graph: Path, inputs: Mapping[str, object], expected: str, take: str = "") -> ExportError:
    data_free = "--quantizer default, which needs no calibration"
    return ExportError(
        f"calibration has nothing for a graph that reads {', '.join(list(inputs)[:4])}",
        where=graph,
        expected=expected,
        next_step=f"--calibration {take}, or {data_free}" if take else data_free,
    )


def _spoken(model: Path, clips: Clips) -> tuple[list[Mapping[str, Array]], list[list[int]]]:
    """What the encoder reads, and the ids that the decoder reads meanwhile."""
    rows, first = Rows.of(model), first_of_target(model)
    written = [rows.row(clip.transcript) for clip in clips.clips]
    return heard(model, clips), [(ids if ids[:1] == [first] else [first, *ids])[:-1] for ids in written]


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
    sources: Sequence[Mapping[str, Array]],
    targets: Sequence[list[int]],
    scratch: Path,
) -> tuple[list[Stage], int, int]:
    """sources: what the encoder reads, by transformers' names."""
    encoder, decoder = signatures[:2]
    shelf = Shelf(scratch)
    masks = [np.ones(next(iter(source.values())).shape[:2], np.int64) for source in sources]
    read = [
        completed(encoder, {AUDIO: next(iter(source.values())), MASK: mask, **source})
        for source, mask in zip(sources, masks, strict=True)
    ]

    def following(number: int) -> Feed:
        states = {read_as(name): shelf.get(number, name) for name in encoder.outputs}
        mask = sources[number].get(MASK, masks[number])
        return completed(decoder, {ENCODER_MASK: mask, IDS: np.asarray([targets[number]], np.int64), **states})

    written = sum(map(len, targets))
    lengths = [feed[IDS].shape[1] if IDS in feed else 1 for feed in read]
    widest = max(size for feed in read for array in feed.values() for size in array.shape[1:])
    return (
        [
            Stage(graphs[0], read, sum(lengths), widest, _onto(shelf, encoder.outputs)),
            Stage(graphs[1], _Later(len(targets), following), written, max(map(len, targets))),
        ],
        written + sum(feed[IDS].shape[1] for feed in read if IDS in feed),
        len(targets),
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
