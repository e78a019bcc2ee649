"""Feeds: an array for every input of a graph, from given values or from a seed.

What an input means follows from its name (ids, masks, positions, segments, a cache); its length follows from its
axes and from the other inputs.
"""

import math
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lora_export.errors import InputError
from lora_export.graph_runs.signature import (
    BOXES,
    DECODER_IDS,
    EMBEDS,
    ENCODER_MASK,
    GRIDS,
    IDS,
    MASK,
    PIXEL_MASK,
    PIXELS,
    POSITIONS,
    SPECTRUM,
    TYPES,
    WAVE,
    Array,
    GraphValue,
    Signature,
)

Feed = Mapping[str, Array]
SMALLEST_VOCABULARY = 64
SAMPLES = 320  # at 16 kHz, for each position of wav2vec 2
GRID = (4, 4)  # patches along height and width of a made-up picture, where pictures have grids
PATCHES = "num_patches"  # the axis along which the patches of all pictures lie
_INTEGERS = ("tensor(int32)", "tensor(int64)")
_FLOATS = ("tensor(float)", "tensor(float16)", "tensor(bfloat16)")
_NAMED = (IDS, MASK, ENCODER_MASK, POSITIONS, TYPES, BOXES, PIXEL_MASK, DECODER_IDS, *GRIDS)
_PICTURE = 224  # pixels, where nothing says a size
_CHOICES = 4
BUILT_IN: tuple[str, ...] = (
    "The ship left the harbour before dawn, and by noon the coast was a grey line behind it.",
    "Water boils at a lower temperature on a mountain, because the air above it weighs less.",
    "To add two fractions, bring them to a common denominator first; then add what stands above.",
    "She asked him whether the letter had come. He shook his head and went on sweeping the yard.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Question: Which river runs through Vienna?\nAnswer: The Danube, which comes from the Black Forest.",
)


# --- from what is given ------------------------------------------------------------------------------------


def completed(signature: Signature, given: Mapping[str, Any], past: int = 0) -> dict[str, Any]:
    """A feed for every input: what is given, and what follows from it.

    Arrays are cast to the type that the graph reads; OrtValues stay as they are. By default nothing is masked,
    positions begin behind `past` tokens, there is one segment, every token stands at the page's corner, and caches
    are empty. InputError for an input that does not follow from what is given.
    """
    like = next((given[name] for name in (IDS, EMBEDS, WAVE, SPECTRUM) if name in given), None)
    feed = {}
    for name, value in signature.inputs.items():
        array = given.get(name)
        if array is not None and not isinstance(array, np.ndarray):
            feed[name] = array
            continue
        if array is None and like is not None and value.is_cache:
            array = np.zeros(signature.cache_shape(name, len(like), 0), value.dtype)
        elif array is None and like is not None and name in (MASK, POSITIONS, TYPES, BOXES):
            array = _following(name, like.shape[: 2 if IDS not in given else None], past)
        elif array is None and name == PIXEL_MASK and PIXELS in given:
            array = np.ones((given[PIXELS].shape[0], *given[PIXELS].shape[-2:]), np.int64)
        if array is None:
            raise InputError(
                f"the graph reads {name!r}, which does not follow from its other inputs",
                where=signature.path,
                expected=", ".join(dict.fromkeys((*given, MASK, POSITIONS, TYPES))),
            )
        feed[name] = np.ascontiguousarray(array).reshape(array.shape).astype(value.dtype, copy=False)
    return feed


def _following(name: str, shape: Sequence[int], past: int) -> Array:
    """shape: of the tokens: (rows, length), or (rows, choices, length)."""
    *rows, length = shape
    if name == MASK:
        return np.ones((*rows, past + length), np.int64)
    if name == POSITIONS:
        return np.broadcast_to(np.arange(past, past + length), shape)
    return np.zeros((*shape, 4) if name == BOXES else tuple(shape), np.int64)


def token_feeds(signature: Signature, rows: Sequence[Sequence[int]]) -> list[Feed]:
    """One feed per row of token ids: batch 1, nothing masked, positions from 0, empty caches; where the graph reads
    choices, two that are the same.

    InputError for a graph that reads anything else.
    """
    reads_choices = IDS in signature.inputs and len(signature.inputs[IDS].shape) == 3
    given = [[[row, row]] if reads_choices else [row] for row in rows]
    return [completed(signature, {IDS: np.asarray(ids, np.int64)}) for ids in given]


def built_in_rows(folder: Path, longest: int) -> list[list[int]]:
    """Token ids of a few sentences, from the tokenizer in a model's folder, cut to `longest`."""
    return rows_of(folder, BUILT_IN, longest)


def rows_of(folder: Path, texts: Sequence[str], longest: int) -> list[list[int]]:
    """Token ids of texts, cut to `longest`."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return [ids[:longest] for ids in (tokenizer(text)["input_ids"] for text in texts) if ids]


# --- from a seed -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """The sizes of one run. past, encoded: tokens in the cache and from an encoder; wave: samples of a sound;
    named: sizes of other axes, by a pattern in their names; vocabulary: ids are below it."""

    batch: int
    tokens: int
    past: int
    encoded: int
    wave: int
    named: Mapping[str, int] = field(default_factory=dict)
    vocabulary: int = SMALLEST_VOCABULARY


def made_up(inputs: Iterable[GraphValue], sizes: Sizes, seed: int = 0) -> dict[str, Array]:
    """Seeded values for inputs: small token ids, increasing positions, masks of ones, boxes with their corners in
    order, and noise for images, sounds, states and caches. The first axis of each is the batch."""
    inputs = list(inputs)
    length = sizes.wave if any(v.name == WAVE for v in inputs) else sizes.tokens
    return {v.name: _made_up(v, sizes, length, seed) for v in inputs}


def _made_up(value: GraphValue, sizes: Sizes, length: int, seed: int) -> Array:
    if value.dtype.kind not in "biu":
        first = sizes.batch * GRID[0] * GRID[1] if value.shape[0] == PATCHES else sizes.batch
        first = value.shape[0] if isinstance(value.shape[0], int) else first  # one picture at a time
        shape = [first, *(_axis(d, value.name, sizes) for d in value.shape[1:])]
        random = np.random.default_rng([seed, zlib.crc32(value.name.encode())])
        return random.standard_normal(shape, np.float32).astype(value.dtype)
    if value.name == ENCODER_MASK:
        return np.ones((sizes.batch, sizes.encoded), value.dtype)
    between = [_axis(d, value.name, sizes) for d in value.shape[1:]]
    if value.name in GRIDS:
        return np.tile(np.array([1, *GRID], value.dtype), (sizes.batch, 1))
    if value.name == PIXEL_MASK or value.dtype.kind == "b":
        return np.ones((sizes.batch, *between), value.dtype)
    if value.name == BOXES:  # left, top, right, bottom
        corners = tokens(sizes.batch, math.prod(between), seed).reshape(sizes.batch, *between[:-1], 2, 2)
        return np.sort(corners, axis=-2).reshape(sizes.batch, *between).astype(value.dtype)
    if value.name == POSITIONS and isinstance(value.shape[0], int):  # of time, height and width
        flat = _following(POSITIONS, (sizes.batch, length), sizes.past)
        return np.stack([flat] * value.shape[0]).astype(value.dtype)
    choices = between[:-1]
    if value.name in (MASK, POSITIONS, TYPES):
        return _following(value.name, (sizes.batch, *choices, length), sizes.past).astype(value.dtype)
    made = tokens(sizes.batch, math.prod(choices) * sizes.tokens, seed, sizes.vocabulary)
    return made.reshape(sizes.batch, *choices, sizes.tokens).astype(value.dtype)


def tokens(rows: int, count: int, seed: int, vocabulary: int = SMALLEST_VOCABULARY) -> Array:
    """Token ids (rows, count)."""
    return np.random.default_rng(seed).integers(0, vocabulary, (rows, count))


def _axis(axis: int | str | None, name: str, sizes: Sizes) -> int:
    """The size of an axis, from its number or the words in its name; the sum for "a + b"."""
    if isinstance(axis, int):
        return axis
    words = axis or ""
    if "+" in words:
        return sum(_axis(part.strip(), name, sizes) for part in words.split("+"))
    if words.isdigit():
        return int(words)
    further = next((size for word, size in sizes.named.items() if re.search(word, words)), None)
    if further is not None:
        return further
    if words in ("height", "width"):
        return _PICTURE
    if words == "num_choices":
        return _CHOICES
    if name == WAVE:
        return sizes.wave
    if "images" in words:
        return 1
    if "batch" in words:
        return sizes.batch
    return sizes.past if "past" in words else sizes.encoded if "encoder" in words else sizes.tokens


def refuse_unknown(signature: Signature) -> None:
    """InputError for inputs that cannot be made up."""
    unknown = [
        f"{v.name} ({v.type})"
        for v in signature.inputs.values()
        if v.type not in (*_FLOATS, *_INTEGERS, "tensor(bool)") or (v.type in _INTEGERS and v.name not in _NAMED)
    ]
    if unknown:
        raise InputError(
            f"the benchmark does not know these inputs: {', '.join(unknown)}",
            where=signature.path,
            expected=f"{', '.join(_NAMED)}, caches, and images or sounds as floating-point numbers",
        )
