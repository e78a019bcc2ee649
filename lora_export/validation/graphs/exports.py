"""Compares an exported model with the unmerged one: weights, arithmetic, and how much of the adapter is left."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from lora_export.contracts import ExportedPair
from lora_export.errors import ExportError
from lora_export.sentence_modules import modules_of, weight_files
from lora_export.storage.sealed import sha256
from lora_export.validation.comparing.arithmetic import Arithmetic
from lora_export.validation.comparing.comparison import Comparison, Graph
from lora_export.validation.comparing.decoder import BASE
from lora_export.validation.effect.precisions import JudgedExport
from lora_export.validation.graphs import weights as graph_weights
from lora_export.validation.graphs.model import GraphModel, graph_model, shapes_of, tied
from lora_export.validation.graphs.moments import Moments
from lora_export.validation.graphs.numbers import Expected, base_numbers, effective_numbers, numbers_of
from lora_export.validation.known import files_digest
from lora_export.validation.reference.probes import saved_whole, wrapped_modules

QUANTIZED = ("int4", "int8", "nf4")
_INT8 = 4
_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Judge:
    """The references that exports are compared with. merged: the merged folder, only headers if `alone`; keep: as
    in load_unmerged; dtypes: stored types of the merged parameters."""

    comparison: Comparison[Any, Any]
    unmerged: Any
    merged: Path
    alone: bool
    keep: int | None
    dtypes: Any
    provider: str

    def judge(self, pair: ExportedPair) -> JudgedExport:
        """The merged model's graph and the base's, each in two steps, and what both leave of the adapter."""
        expected = effective_numbers(self.unmerged) if self.alone else numbers_of(self.merged)
        stored = self.dtypes if self.alone else None
        with self._model(pair, pair.merged_graphs, expected, stored) as held:
            graph = self._graph(pair, pair.merged_graphs, held, pair.prefix)
            checks = self.comparison.compare_onnx(self.unmerged, graph)
            if held is not None:
                of = "the unmerged model" if self.alone else "the merged folder"
                checks += held.checks(pair.prefix, of)
        graph = replace(graph, model=None)  # frees it before the base's is loaded
        base = Graph(pair.base_graphs, None, self._arithmetic(pair), self.provider, f"{pair.prefix}{BASE}")
        depends = self._base_of(pair, base)
        found = self.comparison.take("graph of the base", depends, partial(self._measured, pair, base))
        checks += [*self.comparison.compare_base(base, found), *found["checks"]]
        effect = self.comparison.effect(graph)
        calibrated = Moments.beside(pair.merged) is not None
        return JudgedExport(pair, tuple(checks), effect, self.comparison.kept_by_weights(), calibrated)

    def _arithmetic(self, pair: ExportedPair) -> Arithmetic:
        return arithmetic_of(pair, pair.base_graphs)

    def _measured(self, pair: ExportedPair, base: Graph) -> dict[str, Any]:
        """Of the base's graph, what no adapter changes."""
        with self._model(pair, pair.base_graphs, base_numbers(self.unmerged), self.dtypes) as held:
            graph = self._graph(pair, pair.base_graphs, held, base.prefix)
            found = self.comparison.measure_base(self.unmerged, graph)
            return {**found, "checks": held.checks(base.prefix, "the base in PyTorch") if held else []}

    def _base_of(self, pair: ExportedPair, base: Graph) -> dict[str, object]:
        """All that `_measured` depends on, besides the base and the inputs."""
        return {
            "graphs": files_digest(pair.base),
            "names": [path.name for path in base.paths],
            "precision": (pair.precision, pair.activations),
            "arithmetic": base.arithmetic,
            "provider": self.provider,
            "prefix": base.prefix,
            "types": {name: str(dtype) for name, dtype in self.dtypes.items()},
            "shapes": shapes_of(self.merged),
            "modules": (modules_of(self.merged), {p: sha256(f) for p, f in weight_files(self.merged).items()}),
            "saved": self._saved(),
            "tied": tied(self.merged),
            "kept": self.keep,
        }

    def _saved(self) -> dict[str, dict[str, torch.Tensor]]:
        """Modules that the adapter saved whole, which fill a graph's model where its data files say nothing."""
        wrapped = wrapped_modules(self.unmerged.base_model.model)
        saved = {path: whole for path, module in wrapped.items() if (whole := saved_whole(module)) is not None}
        return {path: dict(whole.named_parameters()) for path, whole in saved.items()}

    @contextlib.contextmanager
    def _model(
        self, pair: ExportedPair, graphs: tuple[Path, ...], expected: Expected, stored: Any
    ) -> Iterator[GraphModel | None]:
        """None for a graph without a weights map, which is compared by its outputs only."""
        folder = graphs[0].parent
        if (folder / graph_weights.NAME).is_file():
            how = expected, stored, self.keep, not self.alone
            with graph_model(graphs, self.unmerged, self.merged, *how) as held:
                yield held
            return
        if pair.precision in QUANTIZED and pair.activations == "float":
            raise ExportError(
                f"the export has no {graph_weights.NAME}, so its quantized weights cannot be checked",
                where=folder,
                expected="an export of this tool",
                next_step="lora-export export -m MERGED -o ONNX, and validate that",
            )
        yield None

    def _graph(self, pair: ExportedPair, paths: tuple[Path, ...], held: GraphModel | None, prefix: str) -> Graph:
        arithmetic = arithmetic_of(pair, paths)
        if held is None:
            return Graph(paths, None, arithmetic, self.provider, prefix)
        shifted = pair.precision in QUANTIZED and not held.wrong
        return Graph(paths, held.model, arithmetic, self.provider, prefix, shifted, same=held.same)


def arithmetic_of(pair: ExportedPair, paths: tuple[Path, ...]) -> Arithmetic:
    """What the graph computes in: the type of its data, and whether its products convert inputs to 8 bits."""
    folder = paths[0].parent
    if pair.activations != "float":
        return Arithmetic(inputs=0, weights=True)
    if not (folder / graph_weights.NAME).is_file():
        return Arithmetic(_TYPES.get(pair.precision, torch.float32))
    dtype = graph_weights.arithmetic_type(folder)
    factors = {name for path in paths for name in with_eight_bits(path)} if pair.precision in QUANTIZED else set()
    blocks = graph_weights.quantized_blocks(folder, factors)
    if not blocks:
        return Arithmetic(dtype)
    layers = frozenset(name.removesuffix(".weight") for name in blocks)
    return Arithmetic(dtype, min(blocks.values()), layers)


def with_eight_bits(graph: Path) -> Iterator[str]:
    """Quantized weights that are multiplied by inputs of 8 bits (accuracy level 4 of MatMulNBits)."""
    for node in ir.load(graph).graph:
        if node.op_type == "MatMulNBits" and node.attributes.get_int("accuracy_level", 0) == _INT8:
            yield from (str(value.name) for value in node.inputs[1:] if value is not None)
