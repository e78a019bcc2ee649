"""Faults in numbers: attributes, scalar constants, tables, weights. See mutations.py for what a kind gives."""

import random
import re
from collections.abc import Callable
from functools import partial

import numpy as np

from tests.validation.graphs.graph import ATTENTION, Graph

Places = list[tuple[str, Callable[[Graph], None]]]
ARITHMETIC = ("Mul", "Div", "Add", "Sub", "Pow", "Min", "Max")
NORMS = (
    "LayerNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
)  # fmt: skip
WEIGHTED = ("MatMul", "Gemm", "FusedMatMul", "Attention", "Conv", "Gather")
QUANTIZED = {"MatMulNBits": (1, 2), "GatherBlockQuantized": (0, 2)}  # positions of the integers and of their scales
POSITION = re.compile(r"position|wpe|relative_attention|embed_pos", re.IGNORECASE)
TABLES = (7, 8)  # where GroupQueryAttention reads cos and sin
FACTORS = (0.5, 0.8, 1.25, 1.5, 2.0)


def attention_scale(graph: Graph, rng: random.Random) -> Places:
    found: Places = []
    for i, node in graph.of(*ATTENTION):
        factor = rng.choice((1e-4, 0.25, 0.5, 0.8, 1.25, 2.0, 4.0, 8.0))
        scale = (graph.attribute(i, "scale") or graph.head**-0.5) * factor
        words = f"scale of {node.op_type} {i} × {factor:g}"
        found.append((words, partial(Graph.set_attribute, index=i, name="scale", value=float(scale))))
    return found


def epsilon(graph: Graph, rng: random.Random) -> Places:
    found: Places = []
    for i, node in graph.of(*NORMS):
        value = rng.choice((0.01, 0.05, 0.1, 0.5))
        words = f"epsilon of {node.op_type} {i} is {value}"
        found.append((words, partial(Graph.set_attribute, index=i, name="epsilon", value=value)))
    return found


def softcap(graph: Graph, rng: random.Random) -> Places:
    found: Places = []
    for i, _ in graph.of("GroupQueryAttention"):
        before = graph.attribute(i, "softcap") or 0.0
        value = 0.0 if before and rng.random() < 0.3 else rng.choice((0.5, 1.0, 2.0))
        words = f"softcap of GroupQueryAttention {i} is {value}, not {before}"
        found.append((words, partial(Graph.set_attribute, index=i, name="softcap", value=value)))
    return found


def scalar(graph: Graph, rng: random.Random) -> Places:
    """A constant of one element in arithmetic: a scale, an exponent, a cap, the value under a mask."""
    found: Places = []
    for i, node in graph.of(*ARITHMETIC, "Where"):
        for position, name in enumerate(node.input):
            if graph.is_float(name) and graph.value(name).size == 1:
                value, factor = graph.value(name), rng.choice((-1.0, *FACTORS))
                other = 0.1 if not value.any() else -1.0 if np.abs(value) > 1000 else value * factor
                words = f"constant {float(value):g} of {node.op_type} {i} is {float(other):.4g}"
                array = np.full_like(value, other)
                found.append((words, partial(Graph.feed, index=i, position=position, array=array)))
    return found


def weight_scale(graph: Graph, rng: random.Random) -> Places:
    """A tensor, half of its columns, or one row of it, times a factor."""
    found: Places = []
    for i, node in graph.of(*WEIGHTED, *NORMS):
        for position, name in enumerate(node.input):
            shape = graph.shape(name)
            if shape is not None and graph.is_float(name) and np.prod(shape) >= 32 and not POSITION.search(name):
                part, factor = rng.choice(("all", "all", "half of the columns")), rng.choice((0.7, 1.3, 1.3, 1.5))
                words = f"{part} of {name} × {factor:g}"
                found.append((words, partial(_scaled, index=i, position=position, part=part, factor=factor)))
    return found


def _scaled(graph: Graph, index: int, position: int, part: str, factor: float) -> None:
    array = graph.value(graph.nodes[index].input[position])
    where = np.s_[..., : array.shape[-1] // 2] if part != "all" else np.s_[...]
    array[where] = (array[where].astype(np.float32) * factor).astype(array.dtype)
    graph.feed(index, position, array)


def quantized(graph: Graph, rng: random.Random) -> Places:
    """Scales of 4-bit weights: all of a tensor × 1.3, those of half of its rows, of its first block; half-bytes
    exchanged, and rows off by one."""
    found: Places = []
    for i, node in graph.of(*QUANTIZED):
        integers, scales = QUANTIZED[node.op_type]
        for what in ("all scales", "scales of half of the rows", "scales of the first block", "half-bytes", "rows"):
            position = integers if what in ("half-bytes", "rows") else scales
            words = f"{what} of {node.input[position]} {_DONE.get(what, '× 1.3')}"
            found.append((words, partial(_requantized, index=i, position=position, what=what)))
    return found


_DONE = {"half-bytes": "are exchanged", "rows": "are off by one"}


def _requantized(graph: Graph, index: int, position: int, what: str) -> None:
    array = graph.value(graph.nodes[index].input[position])
    if what == "half-bytes":
        array = (array << 4) | (array >> 4)
    elif what == "rows":
        array = np.roll(array, 1, 0)
    else:
        rows = slice(0, len(array) // 2) if "half" in what else slice(None)
        blocks = slice(0, 1) if "block" in what else slice(None)
        array[rows, ..., blocks] = (array[rows, ..., blocks].astype(np.float32) * 1.3).astype(array.dtype)
    graph.feed(index, position, array)


def rotary(graph: Graph, rng: random.Random) -> Places:
    """Tables of cos and sin: other frequencies, another direction, one position further, no angles at all."""
    found: Places = []
    for i, node in graph.of("GroupQueryAttention", "RotaryEmbedding"):
        if len(node.input) > TABLES[1] and graph.shape(node.input[TABLES[0]]):
            factor = rng.choice((0.5, 0.9, 1.1, 2.0))
            for words, change in (
                (f"angles × {factor:g}", partial(_angles, factor=factor)),
                ("angles negated", partial(_angles, factor=-1.0)),
                ("frequencies in reverse order", partial(_angles, reverse=True)),
                ("angles all zero", partial(_angles, factor=0.0)),
            ):
                found.append((f"rotary table of {node.op_type} {i}: {words}", partial(change, index=i)))
            words = f"{node.op_type} {i} rotates neighbours, not halves"
            found.append((words, partial(Graph.set_attribute, index=i, name="rotary_interleaved", value=1)))
    return found


def _angles(graph: Graph, index: int, factor: float = 1.0, reverse: bool = False, first: int = 0) -> None:
    cos, sin = (graph.value(graph.nodes[index].input[p]) for p in TABLES)
    size = np.hypot(cos.astype(np.float64), sin.astype(np.float64))
    steps = np.arctan2(sin[1].astype(np.float64), cos[1].astype(np.float64))  # per position, of each frequency
    angle = np.arange(len(cos))[:, None] * (steps[::-1] if reverse else steps) * factor
    for position, before, after in zip(TABLES, (cos, sin), (np.cos(angle), np.sin(angle)), strict=True):
        array = before.copy()
        array[first:] = (after * size)[first:].astype(before.dtype)
        graph.feed(index, position, array)


def beyond(graph: Graph, rng: random.Random) -> Places:
    """What no short text shows: rows of position tables, rotary angles, and windows that matter from N on."""
    found: Places = []
    for i, node in graph.of("GroupQueryAttention"):
        at = rng.randrange(20, 80)
        if len(node.input) > TABLES[1] and graph.shape(node.input[TABLES[0]]):
            change = partial(_angles, index=i, factor=0.5, first=at)
            found.append((f"rotary angles of GroupQueryAttention {i} halved from position {at} on", change))
        words = f"GroupQueryAttention {i} sees {at} tokens"
        found.append((words, partial(Graph.set_attribute, index=i, name="local_window_size", value=at)))
    for i, node in graph.of("Gather", "Add"):
        for position, name in enumerate(node.input):
            shape = graph.shape(name)
            if shape is not None and POSITION.search(name) and graph.is_float(name) and len(shape) > 1:
                at = rng.randrange(shape[-2] // 8, max(shape[-2] // 2, shape[-2] // 8 + 1))
                words = f"rows of {name} from {at} on are negated"
                found.append((words, partial(_negated, index=i, position=position, first=at)))
    return found


def _negated(graph: Graph, index: int, position: int, first: int) -> None:
    array = graph.value(graph.nodes[index].input[position])
    array[..., first:, :] *= -1
    graph.feed(index, position, array)


def bias(graph: Graph, rng: random.Random) -> Places:
    """A bias of zeros."""
    found: Places = []
    for i, node in graph.of("Add", "Gemm", "Attention", "MatMulNBits", "BiasGelu", "Conv", "FastGelu", *NORMS):
        for position, name in enumerate(node.input):
            shape = graph.shape(name)
            if shape is not None and len(shape) == 1 and shape[0] > 1 and graph.is_float(name) and "bias" in name:
                found.append((f"{name} is zero", partial(_zeroed, index=i, position=position)))
    return found


def _zeroed(graph: Graph, index: int, position: int) -> None:
    graph.feed(index, position, np.zeros_like(graph.value(graph.nodes[index].input[position])))
