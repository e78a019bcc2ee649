"""What all comparisons share: the unmerged model is measured once; merged models and graphs are judged by it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch

from lora_export.contracts import Check, Progress, ValidationResult
from lora_export.validation.comparing.arithmetic import Arithmetic, InTypes, draw
from lora_export.validation.comparing.logits import Difference, compare_logits, greedy_divergences, largest
from lora_export.validation.comparing.noise import draws
from lora_export.validation.comparing.tested_model import running
from lora_export.validation.comparing.thresholds import FACTOR, KL_POWER, Floor, Greedy, graph_checks
from lora_export.validation.effect.effect import AnyEffect, along, effect_exists

Output = TypeVar("Output")  # of a model on one input
Apart = TypeVar("Apart")  # how far apart two models' outputs are, over all inputs
SOME = 3  # inputs on which greedy texts are made, and the losses of each stage are measured


@dataclass(frozen=True)
class Graph:
    """An exported model to be judged.

    paths: its graphs, the encoder's first; model: PyTorch's, in fp32, with the numbers that the graph holds (None
    where they cannot be read); arithmetic: how the graph computes; prefix: of the names of its checks; shifted: the
    numbers are quantized, each as near to its weight as it can be, so that what they do in PyTorch is known to be
    honest.
    """

    paths: tuple[Path, ...]
    model: Any
    arithmetic: Arithmetic
    provider: str
    prefix: str
    shifted: bool = False


@dataclass(kw_only=True)
class Comparison(ABC, Generic[Output, Apart]):
    """How models of one kind are compared with the unmerged one.

    dtypes: stored type of each merged parameter; factor: thresholds are this many noise floors; note: what the
    inputs are, said with the first check; windows: token ids (length,) on which perplexities are taken, none where
    a model predicts no next token.
    """

    dtypes: Mapping[str, torch.dtype]
    progress: Progress
    factor: float = FACTOR
    note: str = ""
    _base: list[Output] = field(default_factory=list)
    _unmerged: list[Output] = field(default_factory=list)
    _rounding: tuple[Apart, ...] = ()
    _sums: tuple[Apart, ...] = ()
    _arithmetic: tuple[Apart, ...] = ()
    _weights: list[float] = field(default_factory=list)  # of the merged graph's numbers and the base's: `_along`
    _answered: list[list[Output]] = field(default_factory=list)  # by the merged model's graphs, by the base's

    INPUTS: ClassVar[str] = "inputs"
    KEEPS_ANSWERS: ClassVar[bool] = True  # for `effect`

    @property
    def windows(self) -> Sequence[torch.Tensor]:
        return ()

    @abstractmethod
    def once(self, model: Any) -> Any:
        """One forward on one input, without a cache."""

    def measure(self, unmerged: Any) -> None:
        """The unmerged model's outputs and the noise floors, which the other methods need."""
        self.progress.stage(f"validate: the unmerged model on {self.INPUTS}, and how far rounding moves it")
        with running(unmerged):
            with unmerged.disable_adapter():
                self._base = self._outputs(unmerged)
                self._measure_base(unmerged)
            self._unmerged = self._outputs(unmerged)
        self._measure_unmerged(unmerged)
        self._rounding = tuple(
            draws(unmerged, self.dtypes, lambda: self._apart(self._unmerged, self._outputs(unmerged)))
        )
        self._sums = (self._draw(unmerged, Arithmetic()),)
        self._continue(unmerged)

    def compare(self, unmerged: Any, merged: Any) -> ValidationResult:
        """The merged model (fp32 arithmetic on its stored weights) against PEFT's unmerged forward."""
        self.measure(unmerged)
        result = self._compared(unmerged, merged)
        return replace(result, checks=tuple(self._noted(list(result.checks))))

    def compare_onnx(self, unmerged: Any, graph: Graph) -> list[Check]:
        """The merged model's graph: against the unmerged model, and against PyTorch with the graph's numbers."""
        self.progress.stage(f"validate: {graph.arithmetic.words}, measured in PyTorch")
        self._arithmetic = self._sums
        if graph.arithmetic != Arithmetic():
            self._arithmetic = (self._draw(unmerged, graph.arithmetic),)
        exact = None if graph.model is None else self._outputs(graph.model)
        self._weights = [] if exact is None else [self._along(exact)]
        self.progress.stage("validate: the exported graph in ONNX Runtime")
        runner = self._runner(graph)
        answers = self._answers(runner)
        self._answered = [answers] if self.KEEPS_ANSWERS else []
        known = self._apart(self._unmerged, exact) if exact and graph.shifted else None
        where = f"rounding errors, and {graph.arithmetic.words}"
        checks = self._judge_graph(graph, runner, answers, known, where)
        return self._noted([*checks, *self._graph_checks(graph, exact or self._unmerged, answers, runner)])

    def compare_base(self, unmerged: Any, graph: Graph) -> list[Check]:
        """The base's graph, against PyTorch with its numbers. After compare_onnx."""
        runner = self._runner(graph)
        self._arithmetic = (*self._arithmetic, self._draw(unmerged, graph.arithmetic, adapted=False))
        exact = self._base if graph.model is None else self._outputs(graph.model)
        self._weights.append(self._along(exact))
        answers = self._answers(runner)
        self._answered += [answers] if self.KEEPS_ANSWERS else []
        return self._graph_checks(graph, exact, answers, runner)

    @abstractmethod
    def effect(self, unmerged: Any, base: Graph, merged: Graph) -> AnyEffect:
        """What the two graphs leave of the adapter's effect. After compare_base."""

    def recall(self, unmerged: Any, scratch: Path) -> None:
        """Keep only what `effect` needs of the unmerged model, which `effect_of` then does without; scratch: a
        folder for what memory should not hold."""
        with running(unmerged):
            with unmerged.disable_adapter():
                self._base = self._outputs(unmerged)
            self._unmerged = self._outputs(unmerged)

    def effect_of(self, base: Graph, merged: Graph) -> AnyEffect:
        """`effect` of one pair of graphs after another. After `recall`, without noise floors and checks."""
        if self.KEEPS_ANSWERS:
            self._answered = [self._answers(self._runner(graph)) for graph in (merged, base)]
        return self.effect(None, base, merged)

    def kept_by(self, merged: Any) -> float | None:
        """The share of the adapter's effect that a merged model keeps; None if the adapter has none."""
        return self._share(self._along(self._outputs(merged, SOME)), self._along(self._base))

    def kept_by_weights(self) -> float | None:
        """The same of the numbers that the last graphs hold, run in PyTorch; None where they cannot be read."""
        return self._share(*self._weights) if len(self._weights) == 2 else None

    def _share(self, low: float, low_base: float) -> float | None:
        before = self._along(self._base)
        whole = self._along(self._unmerged) - before
        return (low - low_base) / whole if effect_exists(whole, self._positions) else None

    # --- what each kind of model says of itself ----------------------------------------------------------------

    @property
    @abstractmethod
    def _positions(self) -> int:
        """How many outputs `_along` adds up."""

    @abstractmethod
    def _outputs(self, model: Any, first: int | None = None) -> list[Output]:
        """What a PyTorch model answers, in fp32. first: on so many inputs (None: all)."""

    @abstractmethod
    def _apart(self, reference: list[Output], other: list[Output]) -> Apart: ...

    @abstractmethod
    def _is_finite(self, apart: Apart) -> bool: ...

    @abstractmethod
    def _along(self, outputs: list[Output]) -> float:
        """The part of some inputs' outputs that lies in the direction in which the adapter changes them."""

    @abstractmethod
    def _compared(self, unmerged: Any, merged: Any) -> ValidationResult: ...

    @abstractmethod
    def _runner(self, graph: Graph) -> Any:
        """Something that runs the graph."""

    @abstractmethod
    def _answers(self, runner: Any) -> list[Output]: ...

    @abstractmethod
    def _judge_graph(
        self, graph: Graph, runner: Any, answers: list[Output], known: Apart | None, where: str
    ) -> list[Check]:
        """Against the unmerged model. known: what its weights do in PyTorch; where: the source of the noise."""

    @abstractmethod
    def _graph_checks(self, graph: Graph, exact: list[Output], answers: list[Output], runner: Any) -> list[Check]:
        """Against PyTorch with the numbers that the graph holds: nothing but arithmetic may differ."""

    def _measure_base(self, base: Any) -> None:
        """More of the model without its adapter."""

    def _measure_unmerged(self, unmerged: Any) -> None:
        """More that the noise floors need."""

    def _continue(self, unmerged: Any) -> None:
        """Texts that the unmerged model writes."""

    def _draw(self, unmerged: Any, how: Arithmetic | InTypes, adapted: bool = True) -> Apart:
        """How far arithmetic moves the outputs of the unmerged model."""

        def measure(active: bool) -> Apart:
            return self._apart(self._unmerged if active else self._base, self._outputs(unmerged))

        return draw(unmerged, how, list(self.dtypes), measure, self._is_finite, adapted)

    def _noted(self, checks: list[Check]) -> list[Check]:
        """The first check says what the inputs were."""
        if not self.note or not checks:
            return checks
        return [replace(checks[0], note=f"{checks[0].note}; {self.note}"), *checks[1:]]


@dataclass(kw_only=True)
class LogitsComparison(Comparison[torch.Tensor, Difference]):
    """Of models that predict a next token. tokens: ids (length,) for which logits are compared; tokenizer: decodes
    what is shown."""

    tokens: Sequence[torch.Tensor]
    tokenizer: Any
    _again: tuple[Difference, ...] = ()
    _steps: list[torch.Tensor] = field(default_factory=list)  # logits at each step of the unmerged model's texts

    @property
    def _positions(self) -> int:
        return sum(map(len, self.tokens[:SOME]))

    def _apart(self, reference: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> Difference:
        return compare_logits(reference, other, self.tokens)

    def _is_finite(self, apart: Difference) -> bool:
        return math.isfinite(apart.max_abs)

    def _along(self, outputs: list[torch.Tensor]) -> float:
        return sum(along(*at) for at in zip(self._base[:SOME], self._unmerged[:SOME], outputs, strict=False))

    def _floor(self, where: str, *sources: tuple[Difference, ...], known: Difference | None = None) -> Floor:
        scale = largest(float(x.abs().max()) for x in (*self._unmerged, *self._base))
        return Floor((*sources, self._again), scale, where, known)

    def _graph_floor(self, graph: Graph) -> Floor:
        rounding = () if graph.model is not None else (self._rounding,)
        return self._floor(graph.arithmetic.words, *self._noise(graph), *rounding)

    def _graph_checks(
        self, graph: Graph, exact: list[torch.Tensor], answers: list[torch.Tensor], runner: Any
    ) -> list[Check]:
        apart = self._apart(exact, answers)
        return graph_checks(self._graph_floor(graph), apart, self.factor, f"{graph.prefix}graph")

    def _noise(self, graph: Graph) -> list[tuple[Difference, ...]]:
        return [self._arithmetic] * graph.arithmetic.times

    def _noise_of_16_bits(self, graph: Graph) -> float:
        """KL a position that 16-bit arithmetic makes, with the tolerance of all checks; 0 for fp32."""
        nats = largest(d.kl_mean for d in self._arithmetic)
        return self.factor**KL_POWER * nats if graph.arithmetic.times > 1 else 0.0

    def _parted(self, tokens: Sequence[torch.Tensor]) -> Greedy:
        """tokens: what another model chooses at each step of the unmerged model's texts."""
        agreement, divergences = greedy_divergences(self._steps, tokens)
        return Greedy(agreement, divergences, self.tokenizer.decode)
