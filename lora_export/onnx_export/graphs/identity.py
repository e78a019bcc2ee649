"""Are two graphs the same work? They are compared after ONNX Runtime has optimized them for a provider.

Two graphs with the same operators, attributes, wiring, shapes, types and steering constants, on the same provider,
launch the same kernels: the values of their weights cannot make one of them slower. On some processors this does
not hold for products of denormal, infinite or NaN values. Sessions are opened with the same options for both.
"""

import difflib
import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from lora_export.contracts import GraphComparison
from lora_export.onnx_export.graphs.canonical import Canonical, Node, canonical
from lora_export.onnx_export.graphs.checks import open_model
from lora_export.onnx_export.graphs.steering_constants import SMALL, steering_constants
from lora_export.storage.sealed import read_json

SHOWN = 8
_EXTERNAL_FROM = "1024"  # bytes; ONNX Runtime needs small shape constants inline
_FUSED = "com.microsoft."
_WIDER = 1.01  # ratio of floating-point bytes that padding does not explain


def compare(base: Sequence[Path], merged: Sequence[Path], provider: str) -> GraphComparison:
    """Whether two models are the same graphs once optimized for `provider`; if not, where they differ, and at what
    cost.

    base and merged: their .onnx files, in the same order. Constants count by value if a shape, an index or a branch
    depends on them (steering_constants.py); an adapter may change any weight. Needs as much temporary disk space as
    the largest model.
    """
    pairs = [_pair(a, b, provider) for a, b in zip(base, merged, strict=True)]
    placement: Counter[str] = Counter()
    for _, graph in pairs:
        placement.update(graph.placement)
    return GraphComparison(
        identical=all(a.sha256 == b.sha256 for a, b in pairs),
        base_sha256=_together([a for a, _ in pairs]),
        merged_sha256=_together([b for _, b in pairs]),
        nodes=sum(len(b.nodes) for _, b in pairs),
        placement=dict(placement),
        differences=tuple(line for a, b in pairs for line in _differences(a, b)),
        warnings=tuple(
            dict.fromkeys(
                [w for a, b in pairs for w in _graph_warnings(a, b)] + _settings_warnings(base[0], merged[0])
            )
        ),
    )


def _pair(base: Path, merged: Path, provider: str) -> tuple[Canonical, Canonical]:
    """Both, optimized; one of them stands for both where the other cannot differ."""
    graph = optimized(merged, provider)
    return (graph if one_stored(base, merged) else optimized(base, provider)), graph


def one_stored(base: Path, merged: Path) -> bool:
    """Whether two files hold one graph, of which ONNX Runtime must then make one, too.

    They are equal byte for byte, and their data files hold the same values wherever those may count: constants that
    steer, whatever is no float, and small tensors, such as an epsilon or a factor, which fusions read. What is left
    are large weights, of which the optimizer computes others and by which it decides nothing.
    """
    if base.read_bytes() != merged.read_bytes():
        return False
    ours, theirs = open_model(base), open_model(merged)
    steering = {value.name for value in steering_constants(ours)}
    return all(
        a.tobytes() == b.tobytes()
        for (name, a), (_, b) in zip(_external(ours), _external(theirs), strict=True)
        if name in steering or not a.dtype.is_floating_point() or a.size <= SMALL
    )


def _external(model: ir.Model) -> Iterator[tuple[str | None, ir.ExternalTensor]]:
    """The initializers of all graphs of a model whose values lie in other files, by name."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.name, value.const_value


def optimized(model: Path, provider: str) -> Canonical:
    """What ONNX Runtime makes of `model` for `provider`."""
    from lora_export.runtime import open_session, session_options

    stored = open_model(model)
    with tempfile.TemporaryDirectory(prefix="lora-export-graph-") as folder:
        written = Path(folder, "optimized.onnx")
        options = session_options()
        options.optimized_model_filepath = str(written)
        for key, value in (
            ("session.optimized_model_external_initializers_file_name", "weights.bin"),
            ("session.optimized_model_external_initializers_min_size_in_bytes", _EXTERNAL_FROM),
            ("session.disable_prepacking", "1"),
            ("session.record_ep_graph_assignment_info", "1"),
        ):
            options.add_session_config_entry(key, value)
        session = open_session(model, provider, options=options)
        placement: Counter[str] = Counter()
        for part in session.get_provider_graph_assignment_info():
            placement[part.ep_name] += len(part.get_nodes())
        return canonical(open_model(written), placement, stored)


def _together(graphs: Sequence[Canonical]) -> str:
    if len(graphs) == 1:
        return graphs[0].sha256
    return hashlib.sha256("\n".join(g.sha256 for g in graphs).encode()).hexdigest()


# --- differences in words ----------------------------------------------------------------------------------


def _differences(a: Canonical, b: Canonical) -> Iterator[str]:
    if a.sha256 == b.sha256:
        return
    ours, theirs = Counter(n.operator for n in a.nodes), Counter(n.operator for n in b.nodes)
    for operator in sorted(ours.keys() | theirs.keys()):
        if ours[operator] != theirs[operator]:
            yield f"{operator}: {ours[operator]} in the base, {theirs[operator]} in the other"
    lines = list(_by_node(a.nodes, b.nodes)) or list(_elsewhere(a, b))
    yield from lines[:SHOWN]
    if len(lines) > SHOWN:
        yield f"and {len(lines) - SHOWN} more nodes differ"


def _by_node(a: Sequence[Node], b: Sequence[Node]) -> Iterator[str]:
    matcher = difflib.SequenceMatcher(None, [n.local for n in a], [n.local for n in b], autojunk=False)
    for kind, i, j, k, m in matcher.get_opcodes():
        if kind == "equal":
            continue
        for ours, theirs in zip(a[i:j], b[k:m], strict=False):
            yield f"{theirs.name}: {_changed(ours, theirs)}"
        yield from (f"{n.name}: only in the base: {n.local}" for n in a[i + m - k : j])
        yield from (f"{n.name}: only in the other: {n.local}" for n in b[k + j - i : m])


def _changed(ours: Node, theirs: Node) -> str:
    """Two nodes in words; if operator and operands are the same, only the attributes that differ."""
    if (ours.operator, ours.operands) != (theirs.operator, theirs.operands):
        a, b = (f"{node.operator}({node.operands})" for node in (ours, theirs))
        return f"the base has {a}; the other has {b}"
    own, other = dict(ours.attributes), dict(theirs.attributes)
    unlike = sorted(key for key in own.keys() | other.keys() if own.get(key) != other.get(key))
    parts = [
        f"{key} {own.get(key, 'absent')} in the base, {other.get(key, 'absent')} in the other" for key in unlike
    ]
    return f"{ours.operator} with {'; '.join(parts)}"


def _elsewhere(a: Canonical, b: Canonical) -> Iterator[str]:
    """For nodes that look alike one by one: the first with other inputs, or what differs outside the nodes."""
    for ours, theirs in zip(a.nodes, b.nodes, strict=True):
        if ours.digest != theirs.digest:
            yield f"{theirs.name}: the same {theirs.operator}, but its inputs come from elsewhere, or are shared"
            return
    if a.placement != b.placement:
        yield f"nodes by provider: {_counted(a.placement)} in the base, {_counted(b.placement)} in the other"
    else:
        yield "the names, types or shapes of the graphs' inputs or outputs"


def _counted(placement: Mapping[str, int]) -> str:
    return ", ".join(f"{provider} {n}" for provider, n in sorted(placement.items())) or "none"


# --- what else makes a merged model slower ------------------------------------------------------------------


def _graph_warnings(base: Canonical, merged: Canonical) -> Iterator[str]:
    ours, theirs = (_floating(g) for g in (base, merged))
    if sum(theirs.values()) > _WIDER * sum(ours.values()):
        yield (
            f"the merged graph has {sum(theirs.values()):,} bytes of floating-point weights ({', '.join(theirs)}), "
            f"the base {sum(ours.values()):,} ({', '.join(ours) or 'none'}): export both in the same --precision"
        )
    if base.tied and not merged.tied:
        yield (
            "the base's embedding and output layer share one weight, but the merged model's do not: an adapter on "
            "tied embeddings changes one of the two, and both are then read from memory"
        )
    lost = Counter(n.operator for n in base.nodes if n.operator.startswith(_FUSED))
    lost.subtract(n.operator for n in merged.nodes)
    for operator, n in sorted(lost.items()):
        if n > 0:
            yield f"{n} fewer {operator.removeprefix(_FUSED)} in the merged graph: fusions were lost"


def _floating(graph: Canonical) -> dict[str, int]:
    return {k.lower(): n for k, n in sorted(graph.initializer_bytes.items()) if "FLOAT" in k or k == "DOUBLE"}


def _settings_warnings(base: Path, merged: Path) -> list[str]:
    warnings = []
    for name in ("config.json", "generation_config.json"):
        path, before = merged.with_name(name), base.with_name(name)
        settings = read_json(path) if path.is_file() else {}
        if settings.get("use_cache") is False:
            warnings.append(
                f"{name} has use_cache false: a runtime that obeys it recomputes all tokens at each step"
            )
        tied = settings.get("tie_word_embeddings")
        if tied is False and before.is_file() and read_json(before).get("tie_word_embeddings") is True:
            warnings.append(f"{name} no longer ties the embeddings: the output layer has its own weight")
    return warnings
