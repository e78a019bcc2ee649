"""An ONNX graph that can be changed: its nodes, its constants with their values, and what is put between nodes."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ATTENTION = ("Attention", "MultiHeadAttention", "GroupQueryAttention")
MICROSOFT = "com.microsoft"


class Graph:
    """One file of an export. `head`: channels of an attention head, for scales that the graph leaves out."""

    def __init__(self, path: Path, head: int) -> None:
        self.path, self.head = path, head
        self.proto = onnx.load(path, load_external_data=False)
        self._kept: dict[str, Any] = {}
        self._tensors = {t.name: t for t in self.proto.graph.initializer}
        for node in self.proto.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self._tensors[node.output[0]] = node.attribute[0].t

    @property
    def nodes(self) -> Any:
        return self.proto.graph.node

    @property
    def inputs(self) -> list[Any]:
        return list(self.proto.graph.input)

    def of(self, *types: str) -> Iterator[tuple[int, Any]]:
        """(index, node) of every node of these types."""
        return ((i, n) for i, n in enumerate(self.nodes) if n.op_type in types)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of a constant; None for what is computed."""
        return tuple(self._tensors[name].dims) if name in self._tensors else None

    def is_float(self, name: str) -> bool:
        floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
        return name in self._tensors and self._tensors[name].data_type in floats

    def value(self, name: str) -> Any:
        """The numbers of a constant, from the data file if they lie there; read once."""
        if name not in self._kept:
            array = numpy_helper.to_array(self._tensors[name], str(self.path.parent))
            self._kept[name] = array
        return np.array(self._kept[name])

    def feed(self, index: int, position: int, array: Any) -> None:
        """Give one input of one node a constant of its own."""
        name = f"fault_{len(self.proto.graph.initializer)}"
        self.proto.graph.initializer.append(numpy_helper.from_array(np.array(array, order="C"), name))
        self._tensors[name] = self.proto.graph.initializer[-1]
        self.nodes[index].input[position] = name

    def attribute(self, index: int, name: str) -> Any:
        found = [a for a in self.nodes[index].attribute if a.name == name]
        return helper.get_attribute_value(found[0]) if found else None

    def set_attribute(self, index: int, name: str, value: Any) -> None:
        node = self.nodes[index]
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    def bypass(self, index: int, position: int = 0) -> None:
        """Who reads the first output of a node reads one of its inputs instead."""
        node = self.nodes[index]
        self._change(index, helper.make_node("Identity", [node.input[position]], [node.output[0]]))

    def become(self, index: int, op_type: str, domain: str = "", inputs: Sequence[str] = (), **given: Any) -> None:
        """Another operator with the first output of the node; by default with its inputs."""
        node = self.nodes[index]
        names = list(inputs or node.input)
        self._change(index, helper.make_node(op_type, names, [node.output[0]], domain=domain, **given))

    def _change(self, index: int, made: Any) -> None:
        self.nodes[index].CopyFrom(made)

    def before(self, index: int, position: int, *steps: Any) -> None:
        """Put operators between a node's input and what gives it; see `_chain`."""
        node = self.nodes[index]
        made, last = self._chain(node.input[position], steps)
        node.input[position] = last
        self._insert(index, made)

    def after_input(self, name: str, *steps: Any) -> None:
        """Put operators behind an input of the graph."""
        made, last = self._chain(name, steps)
        for node in self.nodes:
            for i, given in enumerate(node.input):
                if given == name:
                    node.input[i] = last
        self._insert(0, made)

    def after(self, index: int, *steps: Any) -> None:
        """Put operators behind the first output of a node."""
        node = self.nodes[index]
        name, node.output[0] = node.output[0], f"{node.output[0]}_unspoiled"
        made, last = self._chain(node.output[0], steps)
        made.append(helper.make_node("Identity", [last], [name]))
        self._insert(index + 1, made)

    def _chain(self, name: str, steps: Sequence[Any]) -> tuple[list[Any], str]:
        """Nodes one behind another. A step is (operator, inputs, attributes): among the inputs "_" is what came
        before, "$" the beginning, an array a constant."""
        made: list[Any] = []
        last = name
        for op_type, given, attributes in steps:
            inputs = [self._named(x, last, name) for x in given]
            last = f"{name}_fault_{len(self.proto.graph.initializer)}_{len(made)}"
            made.append(helper.make_node(op_type, inputs, [last], **attributes))
        return made, last

    def _named(self, given: Any, last: str, first: str) -> str:
        if isinstance(given, str):
            return {"_": last, "$": first}.get(given, given)
        name = f"fault_{len(self.proto.graph.initializer)}"
        self.proto.graph.initializer.append(numpy_helper.from_array(np.asarray(given), name))
        return name

    def _insert(self, index: int, made: Sequence[Any]) -> None:
        rest = list(self.nodes)
        del self.nodes[:]
        self.nodes.extend([*rest[:index], *made, *rest[index:]])

    def sum_of(self, index: int, first: str, second: str, name: str) -> None:
        self._insert(index, [helper.make_node("Add", [first, second], [name])])

    def save(self) -> None:
        """Over the file itself, which may be a hard link to the honest one."""
        self.path.unlink()
        onnx.save(self.proto, self.path)
