"""Faults in what a graph does: axes, masks, types, nodes that are missing or another, inputs that are exchanged.
See mutations.py for what a kind gives."""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from onnx import TensorProto

from tests.validation.graphs.constants import NORMS, POSITION, Places
from tests.validation.graphs.graph import ATTENTION, MICROSOFT, Graph

Steps = tuple[Any, ...]
ZERO: Steps = (("Sub", ("_", "_"), {}),)
ONE = np.array(1, np.int64)
ACTIVATIONS = {
    "Relu": (("Softplus", ""), ("Gelu", MICROSOFT)),
    "Gelu": (("Relu", ""), ("QuickGelu", MICROSOFT)),
    "FastGelu": (("Relu", ""), ("QuickGelu", MICROSOFT)),
    "QuickGelu": (("Relu", ""), ("Gelu", MICROSOFT)),
    "BiasGelu": (("Add", ""),),
    "Tanh": (("Softsign", ""), ("HardSigmoid", "")),
    "Sigmoid": (("HardSigmoid", ""), ("Tanh", "")),
}
LOW = {"bfloat16": TensorProto.BFLOAT16, "float8e4m3": TensorProto.FLOAT8E4M3FN, "integers": TensorProto.INT32}
WIDE = ("MatMul", "MatMulNBits", "Add", "Mul", "BiasGelu", "Gelu", "Relu", *NORMS, *ATTENTION)


def axis(graph: Graph, rng: random.Random) -> Places:
    found: Places = []
    for i, node in graph.of("Softmax", "LogSoftmax", "Concat", "Gather", "ReduceMean", "Split"):
        before = graph.attribute(i, "axis")
        for value in (-2, 0, 1, 2):
            if before is not None and value != before:
                words = f"axis of {node.op_type} {i} is {value}, not {before}"
                found.append((words, partial(Graph.set_attribute, index=i, name="axis", value=value)))
    for i, _ in graph.of("Transpose"):
        perm = list(graph.attribute(i, "perm") or [])
        a, b = sorted(rng.sample(range(len(perm)), 2)) if len(perm) > 1 else (0, 0)
        perm[a : a + 1], perm[b : b + 1] = perm[b : b + 1], perm[a : a + 1]
        words = f"Transpose {i} gives {perm}"
        found.append((words, partial(Graph.set_attribute, index=i, name="perm", value=perm)))
    for i, node in graph.of("Gather", "Slice"):
        position = 1
        name = node.input[position]
        if graph.shape(node.input[0]) is None and graph.shape(name) is not None and graph.value(name).size == 1:
            other = graph.value(name) + 1
            words = f"{node.op_type} {i} takes index {int(other)} in place of {int(other) - 1}"
            found.append((words, partial(Graph.feed, index=i, position=position, array=other)))
    return found


def _masks(graph: Graph) -> list[str]:
    return [x.name for x in graph.inputs if x.name.endswith("attention_mask")]


def mask(graph: Graph, rng: random.Random) -> Places:
    """A mask that is inverted, shifted by one, or blind to the first token."""
    end, one = (np.array([x], np.int64) for x in (2**62, 1))
    shifted: Steps = (
        ("Slice", ("$", one, end, one), {}),
        ("Pad", ("_", np.array([0, 0, 0, 1], np.int64)), {}),
    )
    blind: Steps = (
        ("Slice", ("$", one, end, one), {}),
        ("Pad", ("_", np.array([0, 1, 0, 0], np.int64)), {}),
    )
    found: Places = []
    for name in _masks(graph):
        for words, steps in (
            ("is inverted", (("Sub", (ONE, "_"), {}),)),
            ("is shifted by one", shifted),
            ("leaves out the first token", blind),
        ):
            found.append((f"{name} {words}", partial(_behind, name=name, steps=steps)))
    return found


def _behind(graph: Graph, name: str, steps: Steps) -> None:
    graph.after_input(name, *steps)


def padding(graph: Graph, rng: random.Random) -> Places:
    """What only padded batches show: the mask is taken to be all ones."""
    ones: Steps = (("Sub", ("_", "_"), {}), ("Add", ("_", ONE), {}))
    found: Places = [(f"{name} is ignored", partial(_behind, name=name, steps=ones)) for name in _masks(graph)]
    for i, node in graph.of("Attention", "MultiHeadAttention"):
        position = 3 if node.op_type == "Attention" else 4
        if len(node.input) > position and node.input[position]:
            found.append((f"{node.op_type} {i} has no mask", partial(_unfed, index=i, position=position)))
    return found


def _unfed(graph: Graph, index: int, position: int) -> None:
    graph.nodes[index].input[position] = ""


def causality(graph: Graph, rng: random.Random) -> Places:
    found: Places = []
    for i, node in graph.of("LessOrEqual", "GreaterOrEqual", "Less", "Greater"):
        strict = {"LessOrEqual": "Less", "GreaterOrEqual": "Greater"}
        other = strict.get(node.op_type) or {"Less": "LessOrEqual", "Greater": "GreaterOrEqual"}[node.op_type]
        found.append((f"{node.op_type} {i} is {other}", partial(Graph.become, index=i, op_type=other)))
    for i, node in graph.of("Attention", "MultiHeadAttention"):
        before = graph.attribute(i, "unidirectional") or 0
        words = f"{node.op_type} {i} is {'not ' if before else ''}causal"
        found.append((words, partial(Graph.set_attribute, index=i, name="unidirectional", value=1 - before)))
        if node.op_type == "MultiHeadAttention" and len(node.input) > 5 and node.input[5]:
            found.append((f"{node.op_type} {i} has no bias of its scores", partial(_unfed, index=i, position=5)))
    for i, _ in graph.of("GroupQueryAttention"):
        width = rng.randrange(3, 20)
        words = f"GroupQueryAttention {i} sees {width} tokens"
        found.append((words, partial(Graph.set_attribute, index=i, name="local_window_size", value=width)))
    return found


def cast(graph: Graph, rng: random.Random) -> Places:
    """Values between two nodes rounded to a lower type, and back."""
    found: Places = []
    for i, node in graph.of(*WIDE):
        name, low = rng.choice(list(LOW.items()))
        steps: Steps = (("Cast", ("_",), {"to": low}), ("CastLike", ("_", "$"), {}))
        found.append((f"output of {node.op_type} {i} goes through {name}", partial(_after, index=i, steps=steps)))
    return found


def _after(graph: Graph, index: int, steps: Steps) -> None:
    graph.after(index, *steps)


def _before(graph: Graph, index: int, position: int, steps: Steps) -> None:
    graph.before(index, position, *steps)


def residual(graph: Graph, rng: random.Random) -> Places:
    """One of two computed summands is left out."""
    found: Places = []
    for i, node in graph.of("Add", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"):
        if any(graph.shape(name) is not None for name in node.input[:2]):
            continue
        for position in (0, 1):
            change: Callable[[Graph], None] = partial(_before, index=i, position=position, steps=ZERO)
            found.append((f"summand {position + 1} of {node.op_type} {i} is left out", change))
    return found


def norm(graph: Graph, rng: random.Random) -> Places:
    found: Places = []
    for i, node in graph.of(*NORMS):
        if node.op_type.startswith("Skip"):
            change: Callable[[Graph], None] = partial(_added, index=i)
        else:
            change = partial(Graph.bypass, index=i)
        found.append((f"{node.op_type} {i} does not normalize", change))
    return found


def _added(graph: Graph, index: int) -> None:
    node = graph.nodes[index]
    first, second, wanted = node.input[0], node.input[1], node.output[0]
    node.output[0] = f"{wanted}_normalized"
    graph.sum_of(index + 1, first, second, wanted)


def no_activation(graph: Graph, rng: random.Random) -> Places:
    return [
        (f"{node.op_type} {i} is left out", partial(Graph.bypass, index=i))
        for i, node in graph.of(*ACTIVATIONS)
        if node.op_type != "BiasGelu"
    ]


def other_activation(graph: Graph, rng: random.Random) -> Places:
    found: Places = []
    for i, node in graph.of(*ACTIVATIONS):
        op_type, domain = rng.choice(ACTIVATIONS[node.op_type])
        words = f"{node.op_type} {i} is {op_type}"
        found.append((words, partial(Graph.become, index=i, op_type=op_type, domain=domain)))
    return found


def attention(graph: Graph, rng: random.Random) -> Places:
    return [
        (f"output of {node.op_type} {i} is zero", partial(_after, index=i, steps=ZERO))
        for i, node in graph.of(*ATTENTION)
    ]


def swapped(graph: Graph, rng: random.Random) -> Places:
    """Operands in the wrong order: of a difference or a quotient, of keys and values, of norms' weight and bias."""
    found: Places = []
    for i, node in graph.of("Sub", "Div", "MatMul", "Concat"):
        if len(node.input) == 2 and graph.shape(node.input[1]) is None:
            found.append((f"operands of {node.op_type} {i} are exchanged", partial(_exchange, index=i, a=0, b=1)))
    for i, node in graph.of("MultiHeadAttention", "GroupQueryAttention"):
        for a, b in ((0, 1), (1, 2)):
            if node.input[a] and node.input[b]:
                words = f"inputs {a + 1} and {b + 1} of {node.op_type} {i} are exchanged"
                found.append((words, partial(_exchange, index=i, a=a, b=b)))
    for i, node in graph.of("LayerNormalization", "SkipLayerNormalization"):
        a = 1 if node.op_type == "LayerNormalization" else 2
        if len(node.input) > a + 1 and node.input[a + 1]:
            words = f"weight and bias of {node.op_type} {i} are exchanged"
            found.append((words, partial(_exchange, index=i, a=a, b=a + 1)))
    for i, _ in graph.of("Attention"):
        found.append((f"query and key of Attention {i} are exchanged", partial(_turn, index=i, order=(1, 0, 2))))
        found.append((f"key and value of Attention {i} are exchanged", partial(_turn, index=i, order=(0, 2, 1))))
    return found


def _exchange(graph: Graph, index: int, a: int, b: int) -> None:
    names = graph.nodes[index].input
    names[a], names[b] = names[b], names[a]


def _turn(graph: Graph, index: int, order: tuple[int, ...]) -> None:
    """The thirds of a packed weight and of its bias in another order."""
    for position in (1, 2):
        thirds = np.split(graph.value(graph.nodes[index].input[position]), 3, -1)
        graph.feed(index, position, np.concatenate([thirds[k] for k in order], -1))


def positions(graph: Graph, rng: random.Random) -> Places:
    """Positions that are one too large, or a table of them that is one row off."""
    found: Places = []
    if any(x.name == "position_ids" for x in graph.inputs):
        steps: Steps = (("Add", ("_", ONE), {}),)
        found.append(("position_ids are one too large", partial(_behind, name="position_ids", steps=steps)))
    for i, node in graph.of("Gather", "Add", "Slice"):
        for position, name in enumerate(node.input):
            shape = graph.shape(name)
            if shape is not None and POSITION.search(name) and len(shape) > 1:
                along = -1 if node.op_type == "Slice" else -2
                words = f"{name} is off by one position"
                found.append((words, partial(_rolled, index=i, position=position, along=along)))
    return found


def _rolled(graph: Graph, index: int, position: int, along: int) -> None:
    graph.feed(index, position, np.roll(graph.value(graph.nodes[index].input[position]), 1, along))


def cache(graph: Graph, rng: random.Random) -> Places:
    """What is seen from the second step on: keys and values that were kept are read as others."""
    found: Places = []
    for given in graph.inputs:
        if given.name.startswith("past"):
            kind = given.type.tensor_type.elem_type
            number = np.array(
                rng.choice((0.5, 0.9, -1.0)), np.float16 if kind == TensorProto.FLOAT16 else np.float32
            )
            steps: Steps = (("Mul", ("_", number), {}),)
            words = f"{given.name} is read × {float(number):.2g}"
            found.append((words, partial(_behind, name=given.name, steps=steps)))
    return found
