"""The next adapter of an exported graph: the same graph files byte for byte, and new data files."""

import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from lora_export.contracts import TensorSource
from lora_export.errors import ExportError
from lora_export.onnx_export.engines.model_without_weights import SMALL
from lora_export.onnx_export.records import ExportRecord
from lora_export.onnx_export.weights import map as weights_map
from lora_export.onnx_export.weights.map import WeightsMap
from lora_export.storage import sealed

_END = "eos_token_id"
# What a config.json may say differently for the same graph: who saved it, in which type, from where.
_NO_MATTER = frozenset(
    {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "_diffusers_version"}
)


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of what a graph may depend on in a config.json."""
    import hashlib

    kept = {k: v for k, v in config.items() if k not in _NO_MATTER}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def refuse_other_model(
    earlier: Path,
    record: ExportRecord,
    config: Mapping[str, Any],
    found: WeightsMap,
    hashes: Mapping[str, str],
) -> None:
    """ExportError unless `earlier`'s graph is the one that a fresh export of this model would make."""
    if record.config_digest not in (config_digest(config), config_digest(_with_ends_of(earlier, record, config))):
        raise _other(earlier, "config.json is another than that of the model that was exported", None)
    before = found.hashes
    if before.keys() != hashes.keys():
        odd = sorted(before.keys() ^ hashes.keys())[0]
        has = "the exported model" if odd in before else "this model"
        raise _other(earlier, f"only {has} has the tensor", odd)
    fixed = (before.keys() - found.tensors) | {n for w in found.weights for n in w.recipe.computed_from}
    for name in sorted(fixed & before.keys()):
        if hashes[name] != before[name]:
            raise _other(earlier, "the graph holds this tensor in a way that no recipe says, and it changed", name)


def _with_ends_of(earlier: Path, record: ExportRecord, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration with the end of a text of the earlier model: no decoder's graph asks for it."""
    path = earlier / "config.json"
    if record.kind != "decoder" or not path.is_file():
        return config
    before = sealed.read_json(path)
    same = {k: v for k, v in config.items() if k != _END} | {k: before[k] for k in (_END,) if k in before}
    inner, inner_before = same.get("text_config"), before.get("text_config")
    if isinstance(inner, dict) and isinstance(inner_before, dict) and _END in inner:
        same["text_config"] = {**inner, _END: inner_before.get(_END)}
    return same


def refuse_undescribed(found: WeightsMap, source: TensorSource) -> None:
    """ExportError if the engine computed something of large tensors, which were not in the files that it read."""
    computed = {n for w in found.weights for n in w.recipe.computed_from}
    left = [n for n, t in source.tensors.items() if n not in found.tensors and prod(t.shape) > SMALL]
    if computed or left:
        raise ExportError(
            "the engine computes a part of the graph from this tensor, and no merged folder holds it",
            tensor=sorted(computed or left)[0],
            expected="a model whose weights go into the graph as they are, turned, joined or cast",
            next_step="the same command without --no-merged-folder",
        )


def _other(earlier: Path, found: str, tensor: str | None) -> ExportError:
    return ExportError(
        found,
        where=earlier,
        tensor=tensor,
        expected="an export of the same base, before or after another adapter was merged",
        next_step="export the model without --graph-from",
    )


def read_map(earlier: Path, graphs: tuple[str, ...]) -> WeightsMap:
    """The map of an earlier export, whose data files are there, whole, and plain files. ExportError otherwise."""
    from lora_export.onnx_export.graphs.checks import check_external_data, load_graph

    if not (earlier / weights_map.NAME).is_file():
        raise ExportError(
            f"the export has no {weights_map.NAME}: it does not say what its weights are made of",
            where=earlier,
            expected="an export that is not unmerged, without int8 activations, by this version",
            next_step="export the model without --graph-from",
        )
    described = weights_map.read(earlier)
    for graph in graphs:
        model = load_graph(earlier / graph)
        check_external_data(earlier / graph, model)
        _check_places(earlier / graph, model, described)
    for file, size in described.sizes.items():
        path = earlier / file
        if path.is_symlink() or not path.is_file() or path.stat().st_size < size:
            raise ExportError(
                "the data file is missing, a link or too short",
                where=path,
                expected=f"a file of {size} bytes",
                next_step="export the base again",
            )
    return described


def _check_places(path: Path, model: Any, found: WeightsMap) -> None:
    """Every external tensor of the graph is a weight of the map, at the same place."""
    known = {(w.file, w.name): w for w in found.weights}
    for tensor in model.graph.initializer:
        entries = {e.key: e.value for e in tensor.external_data}
        if not entries:
            continue
        weight = known.get((entries.get("location", ""), tensor.name))
        if weight is None or (weight.offset, weight.nbytes) != (
            int(entries.get("offset", 0)), int(entries.get("length", -1)),
        ):  # fmt: skip
            raise ExportError(
                "the graph and the weights map disagree on where this initializer lies",
                where=path,
                tensor=tensor.name,
                expected="both as they were written",
                next_step="export the base again",
            )


def copy_graphs(earlier: Path, output: Path, names: Sequence[str]) -> None:
    """Copy what the engine made, byte for byte: the graphs and the runtime's configuration."""
    for name in names:
        if not sealed.plain_name(name):
            raise ExportError(
                f"the record of the export names the file {name!r}",
                where=earlier,
                expected="names of files in the folder of the export",
                next_step="export the base again",
            )
        sealed.copy(earlier / name, output / name)
