"""A fault drawn, put into the graphs of a merge and of its base, and judged by `validate` with `--onnx`; and honest
exports judged in the same way."""

import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_export import api
from lora_export.choices import Precision
from lora_export.contracts import Check, ValidationOptions
from lora_export.errors import LoraExportError
from lora_export.onnx_export import load_export
from tests.validation.graphs import effects
from tests.validation.graphs.graph import Graph
from tests.validation.graphs.models import Adapted, Tiny, Workshop
from tests.validation.graphs.mutations import Fault, draw

VISIBLE = 1e-4  # a share of the largest output; fp32 graphs of these models agree with PyTorch to about 1e-6
EXACT_INPUTS = 1  # MatMulNBits' accuracy_level that leaves its inputs as they are; the exports say 4: 8 bits
TRIES = 40
VERDICTS = ("onnx_adapter_survival", "onnx_kl")
FEW = 2


@dataclass(frozen=True)
class Verdict:
    """refused: what `validate` said where it gave no checks."""

    checks: tuple[Check, ...] = ()
    refused: str = ""

    @property
    def failed(self) -> list[Check]:
        return [c for c in self.checks if not c.passed]

    @property
    def names(self) -> set[str]:
        return {c.name for c in self.failed} | ({"refused"} if self.refused else set())


@dataclass(frozen=True)
class Drawn:
    """effect: on valid inputs, as a share of the largest output of the honest graphs; noise: what arithmetic in the
    precision alone does to them, in the same unit."""

    fault: Fault
    effect: float
    noise: float
    merged: Path
    base: Path
    draws: int


@dataclass
class Bench:
    """The exports of one model in one precision; spoiled copies lie under `work`."""

    workshop: Workshop
    tiny: Tiny
    precision: Precision
    work: Path
    _honest: list[Any] = field(default_factory=list)
    _noise: float | None = None
    _alarms: set[str] | None = None

    @property
    def adapted(self) -> Adapted:
        return self.workshop.adapted(self.tiny)

    @property
    def base(self) -> Path:
        return self.workshop.exported(self.tiny, self.precision)

    @property
    def merged(self) -> Path:
        return self.workshop.reweighted(self.tiny, self.precision, self.adapted)

    def alarms(self) -> set[str]:
        """Checks that fail without any fault: they catch none."""
        if self._alarms is None:
            self._alarms = self.judge(self.merged, self.base).names
        return self._alarms

    def judge(
        self, merged: Path, base: Path, adapted: Adapted | None = None, prompts: Path | None = None
    ) -> Verdict:
        adapted = adapted or self.adapted
        options = ValidationOptions(provider="cpu", prompts=prompts)
        folders = self.workshop.base(self.tiny), adapted.adapter, adapted.merged
        try:
            result = api.validate(*folders, onnx=[merged], base_onnx=[base], options=options)
        except LoraExportError as error:
            return Verdict(refused=str(error).splitlines()[0])
        return Verdict(result.checks)

    def caught(self, verdict: Verdict) -> list[str]:
        """Names of the checks of graphs that fail by the fault. Few might fail without it: that is tried then.

        That little is left of the adapter, or much lost beside it, is a verdict on the precision; it notices no
        fault.
        """
        found = {n for n in verdict.names if (n.startswith("onnx") and n not in VERDICTS) or n == "refused"}
        return sorted(found if len(found) > FEW else found - self.alarms())

    def draw(self, kind: str, rng: random.Random) -> Drawn | None:
        """A fault of this kind whose graphs run and answer otherwise than by noise; None if none is found."""
        for attempt in range(TRIES):
            graphs = load_export(self.merged).graphs
            fault = draw(kind, self._graph(self.merged, rng.choice(graphs)), rng)
            if fault is None:
                continue
            merged = self._spoiled(fault, self.merged, "merged")
            effect = self._effect(merged)
            if effect > self.noise():
                spoiled = self._spoiled(fault, self.base, "base")
                return Drawn(fault, effect, self.noise(), merged, spoiled, attempt + 1)
        return None

    def noise(self) -> float:
        """VISIBLE, or how far arithmetic in the precision moves the honest outputs, if that is more: of fp16 beside
        the fp32 export, of int4 products on inputs of 8 bits beside those on exact inputs."""
        if self._noise is None:
            self._noise = max(VISIBLE, effects.effect(self._outputs(), self._otherwise()))
        return self._noise

    def _otherwise(self) -> Sequence[Any]:
        if self.precision != "int4":
            return self._answers(self.workshop.reweighted(self.tiny, "fp32", self.adapted))
        folder = self.work / "exact"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.merged, folder)
        for name in load_export(folder).graphs:
            graph = self._graph(folder, name)
            for index, _ in graph.of("MatMulNBits"):
                graph.set_attribute(index, "accuracy_level", EXACT_INPUTS)
            graph.save()
        return self._answers(folder)

    def _outputs(self) -> Sequence[Any]:
        if not self._honest:
            self._honest = list(self._answers(self.merged))
        return self._honest

    def _graph(self, folder: Path, name: str) -> Graph:
        return Graph(folder / name, self.tiny.head)

    def _spoiled(self, fault: Fault, honest: Path, name: str) -> Path:
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(honest, folder)
        graph = self._graph(folder, fault.graph)
        fault.change(graph)
        graph.save()
        return folder

    def _effect(self, spoiled: Path) -> float:
        """0 for a graph that does not load or run: every user would notice."""
        honest = self._outputs()
        try:
            found = self._answers(spoiled)
        except Exception:  # ONNX Runtime's exceptions share no base but this one
            return 0.0
        same = all(a.shape == b.shape for a, b in zip(honest, found, strict=True))
        return effects.effect(honest, found) if same else 0.0

    def _answers(self, folder: Path) -> Sequence[Any]:
        return effects.answers(self.tiny.kind, load_export(folder).paths)
