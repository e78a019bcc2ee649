"""How large a graph becomes when its own functions are put in place of their calls, as a session does.

Thirty functions that each call the one before twice are a kilobyte, and a billion nodes.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.errors import ExportError

if TYPE_CHECKING:
    import onnx

LARGEST = 1_000_000  # nodes; exports have some thousands
DEEPEST = 100  # calls within calls


def refuse_expansion(path: Path, model: "onnx.ModelProto") -> None:
    """ExportError for functions that call themselves, or that make a graph of more than LARGEST nodes."""
    if not model.functions:
        return
    functions = {(f.domain, f.name): f for f in model.functions}
    known: dict[tuple[str, str], int] = {}

    def expanded(nodes: "Iterable[onnx.NodeProto]", depth: int) -> int:
        if depth > DEEPEST:
            raise _refusal(path, f"more than {DEEPEST} calls within calls")
        count = 0
        for node in _all_nodes(nodes):
            called = (node.domain, node.op_type)
            if called in functions and called not in known:
                known[called] = expanded(functions[called].node, depth + 1)
            count += known.get(called, 1)
            if count > LARGEST:
                raise _refusal(path, f"more than {LARGEST:,} nodes")
        return count

    expanded(model.graph.node, 0)


def _all_nodes(nodes: "Iterable[onnx.NodeProto]") -> "Iterator[onnx.NodeProto]":
    """Those of subgraphs, too."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _all_nodes(graph.node)


def _refusal(path: Path, found: str) -> ExportError:
    return ExportError(
        f"the graph's own functions, put in place of their calls, make {found}",
        where=path,
        expected="a graph that is as large as its file",
        next_step="export the model again with lora-export export; do not run this one",
    )
