"""What all comparisons share: the unmerged model is measured once; merged models and graphs are judged by it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
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
from lora_export.validation.known import Answers, materialized

Known = TypeVar("Known")
Value = TypeVar("Value")
Output = TypeVar("Output")  # of a model on one input
Apart = TypeVar("Apart")  # how far apart two models' outputs are, over all inputs
SOME = 3  # inputs on which greedy texts are made, and the losses of each stage are measured


@dataclass(frozen=True)
class Graph:
    """An exported model to be judged.

    paths: its graphs, the encoder's first; model: PyTorch's, in fp32, with the numbers that the graph holds (None
    where they cannot be read); arithmetic: how the graph computes; prefix: of the names of its checks; shifted: the
    numbers are quantized, each as near to its weight as it can be, so that what they do in PyTorch is known to be
    honest; same: its numbers are bit for bit those of the model that it was made of, which answers for `model`.
    """

    paths: tuple[Path, ...]
    model: Any
    arithmetic: Arithmetic
    provider: str
    prefix: str
    shifted: bool = False
    same: bool = False

    @property
    def readable(self) -> bool:
        """Whether its numbers are known."""
        return self.same or self.model is not None


@dataclass(kw_only=True)
class Comparison(ABC, Generic[Output, Apart]):
    """How models of one kind are compared with the unmerged one.

    dtypes: stored type of each merged parameter; factor: thresholds are this many noise floors; note: what the
    inputs are, said with the first check; windows: token ids (length,) on which perplexities are taken, none where
    a model predicts no next token; answers: what is known of the base, None to keep everything in memory.
    """

    dtypes: Mapping[str, torch.dtype]
    progress: Progress
    factor: float = FACTOR
    note: str = ""
    answers: Answers | None = None
    _base: Sequence[Output] = ()
    _unmerged: Sequence[Output] = ()
    _merged: Sequence[Output] = ()
    _rounding: tuple[Apart, ...] = ()
    _sums: tuple[Apart, ...] = ()
    _arithmetic: tuple[Apart, ...] = ()
    _weights: list[float] = field(default_factory=list)  # of the merged graph's numbers and the base's: `_along`
    _low: list[Sequence[Output]] = field(default_factory=list)  # for `effect`, of the merged graphs, of the base's

    INPUTS: ClassVar[str] = "inputs"
    _ALONG: ClassVar[int | None] = None  # inputs that `_along` looks at

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
            self._know_base(unmerged)
            self._unmerged = self._shelf(self._outputs(unmerged))
        self._measure_unmerged(unmerged)
        rounded = partial(self._under_errors, unmerged)
        self._rounding = tuple(draws(unmerged, self.dtypes, lambda: self._apart(self._unmerged, rounded())))
        self._sums = (self._draw(unmerged, Arithmetic()),)
        self._continue(unmerged)

    def _know_base(self, unmerged: Any) -> None:
        """What the model answers without its adapter. What is known of it is taken only if the model that is here
        answers the first input with the very same bits."""
        outputs = partial(self._of_base, "outputs", unmerged, self._outputs)
        self._base = outputs()
        if self.answers is not None and "outputs" in self.answers.taken:
            with unmerged.disable_adapter():
                here = next(iter(self._outputs(unmerged, 1)))
            if not _equal(here, self._base[0]):
                self.answers.distrust()
                self._base = outputs()
        self._measure_base(unmerged)

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
        exact = self._exact(graph, self._merged) if graph.readable else None
        self._weights = [] if exact is None else [self._along(exact)]
        self.progress.stage("validate: the exported graph in ONNX Runtime")
        runner = self._runner(graph)
        answers = self._shelf(self._answers(runner))
        self._low = [self._for_effect(runner, answers)]
        known = self._apart(self._unmerged, exact) if exact and graph.shifted else None
        where = f"rounding errors, and {graph.arithmetic.words}"
        checks = self._judge_graph(graph, runner, answers, known, where)
        beside = self._beside(graph, exact or self._unmerged, answers, runner)
        return self._noted([*checks, *self._graph_checks(graph, beside)])

    def measure_base(self, unmerged: Any, graph: Graph) -> dict[str, Any]:
        """What the base's graph answers, beside PyTorch with its numbers: what `compare_base` asks for, which
        depends on no adapter."""
        exact = self._exact(graph, self._base) if graph.readable else self._base
        runner = self._runner(graph)
        answers = self._shelf(self._answers(runner))
        # The order of fp32 sums was measured on the adapted model: without the adapter they are the same sums.
        drawn = graph.arithmetic == Arithmetic()
        return {
            "arithmetic": () if drawn else (self._draw(unmerged, graph.arithmetic, adapted=False),),
            "exact": exact[: self._ALONG],
            "beside": self._beside(graph, exact, answers, runner),
            "low": self._for_effect(runner, answers),
            "readable": graph.readable,
        }

    def compare_base(self, graph: Graph, found: Mapping[str, Any]) -> list[Check]:
        """The checks of the base's graph. After compare_onnx. found: by `measure_base`."""
        self._arithmetic = (*self._arithmetic, *found["arithmetic"])
        self._weights.append(self._along(found["exact"]))
        self._low.append(found["low"])
        return self._graph_checks(replace(graph, same=found["readable"]), found["beside"])

    def take(self, what: str, inputs: Mapping[str, object], compute: Callable[[], Known]) -> Known:
        """An answer that depends on the base and these inputs alone: known, or computed."""
        if self.answers is None:
            value: Known = materialized(compute())
            return value
        return self.answers.take(what, {"given": self._given, **inputs}, compute)

    @abstractmethod
    def effect(self, merged: Graph) -> AnyEffect:
        """What the two graphs leave of the adapter's effect. After compare_base. merged: the merged model's."""

    def recall(self, unmerged: Any) -> None:
        """Only what `effect` needs of the unmerged model, which `effect_of` then does without."""
        with running(unmerged):
            self._base = self._of_base("outputs", unmerged, self._outputs)
            self._unmerged = self._shelf(self._outputs(unmerged))

    def effect_of(self, base: Graph, merged: Graph) -> AnyEffect:
        """`effect` of one pair of graphs after another. After `recall`, without noise floors and checks."""
        self._low = [self._shelf(self._low_alone(graph)) for graph in (merged, base)]
        return self.effect(merged)

    def kept_by_merged(self) -> float | None:
        """The share of the adapter's effect that the merged model keeps; None if the adapter has none. After
        `compare`."""
        return self._share(self._along(self._merged), self._along(self._base))

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

    @property
    @abstractmethod
    def _given(self) -> Mapping[str, object]:
        """All inputs that the outputs depend on."""

    @abstractmethod
    def _outputs(self, model: Any, first: int | None = None) -> Iterable[Output]:
        """What a PyTorch model answers, in fp32, one input after another. first: so many of them (None: all)."""

    def _under_errors(self, unmerged: Any) -> Iterable[Output]:
        """What the unmerged model answers while its weights have one draw's rounding errors."""
        return self._outputs(unmerged)

    @abstractmethod
    def _apart(self, reference: Iterable[Output], other: Iterable[Output]) -> Apart: ...

    @abstractmethod
    def _is_finite(self, apart: Apart) -> bool: ...

    @abstractmethod
    def _along(self, outputs: Sequence[Output]) -> float:
        """The part of some inputs' outputs that lies in the direction in which the adapter changes them."""

    @abstractmethod
    def _compared(self, unmerged: Any, merged: Any) -> ValidationResult: ...

    @abstractmethod
    def _runner(self, graph: Graph) -> Any:
        """Something that runs the graph."""

    @abstractmethod
    def _answers(self, runner: Any) -> Iterable[Output]: ...

    def _for_effect(self, runner: Any, answers: Sequence[Output]) -> Sequence[Output]:
        """What `effect` needs of a graph."""
        return answers

    def _low_alone(self, graph: Graph) -> Iterable[Output]:
        """The same, and nothing else."""
        return self._answers(self._runner(graph))

    @abstractmethod
    def _judge_graph(
        self, graph: Graph, runner: Any, answers: Sequence[Output], known: Apart | None, where: str
    ) -> list[Check]:
        """Against the unmerged model. known: what its weights do in PyTorch; where: the source of the noise."""

    def _beside(
        self, graph: Graph, exact: Sequence[Output], answers: Sequence[Output], runner: Any
    ) -> dict[str, Apart]:
        """How far a graph's answers are from those of PyTorch with the numbers that it holds."""
        apart = self._apart(exact, answers)
        return {"graph": apart}

    @abstractmethod
    def _graph_checks(self, graph: Graph, beside: Mapping[str, Apart]) -> list[Check]:
        """Of `_beside`: nothing but arithmetic may differ."""

    def _measure_base(self, base: Any) -> None:
        """More of the model without its adapter."""

    def _measure_unmerged(self, unmerged: Any) -> None:
        """More that the noise floors need."""

    def _continue(self, unmerged: Any) -> None:
        """Texts that the unmerged model writes."""

    def _of_base(self, what: str, unmerged: Any, compute: Callable[[Any], Iterable[Value]]) -> Sequence[Value]:
        """What the model computes without its adapter: known, or computed."""

        def without() -> Iterator[Value]:
            with unmerged.disable_adapter():
                yield from compute(unmerged)

        known: Sequence[Value] = self.take(what, {}, without)  # type: ignore[arg-type]
        return known

    def _shelf(self, outputs: Iterable[Output]) -> Sequence[Output]:
        """Outputs that are needed again."""
        return list(outputs)

    def _exact(self, graph: Graph, same: Sequence[Output]) -> Sequence[Output]:
        """What PyTorch answers with a graph's numbers. same: the answers of the model that it was made of."""
        return same if graph.same else self._shelf(self._outputs(graph.model))

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

    _ALONG = SOME
    _again: tuple[Difference, ...] = ()
    _steps: Sequence[torch.Tensor] = ()  # logits at each step of the unmerged model's texts
    _scale: float | None = None  # the largest logit of the unmerged model and of the base

    @property
    def _positions(self) -> int:
        return sum(map(len, self.tokens[:SOME]))

    def _shelf(self, outputs: Iterable[torch.Tensor]) -> Sequence[torch.Tensor]:
        return list(outputs) if self.answers is None else self.answers.shelf(outputs)

    def _apart(self, reference: Iterable[torch.Tensor], other: Iterable[torch.Tensor]) -> Difference:
        return compare_logits(reference, other, self.tokens)

    def _is_finite(self, apart: Difference) -> bool:
        return math.isfinite(apart.max_abs)

    def _along(self, outputs: Sequence[torch.Tensor]) -> float:
        return sum(along(*at) for at in zip(self._base[:SOME], self._unmerged[:SOME], outputs, strict=False))

    def _floor(self, where: str, *sources: tuple[Difference, ...], known: Difference | None = None) -> Floor:
        if self._scale is None:
            self._scale = largest(float(x.abs().max()) for of in (self._unmerged, self._base) for x in of)
        return Floor((*sources, self._again), self._scale, where, known)

    def _graph_floor(self, graph: Graph) -> Floor:
        rounding = () if graph.readable else (self._rounding,)
        return self._floor(graph.arithmetic.words, *self._noise(graph), *rounding)

    def _graph_checks(self, graph: Graph, beside: Mapping[str, Difference]) -> list[Check]:
        floor = self._graph_floor(graph)
        return [
            check
            for name, apart in beside.items()
            for check in graph_checks(floor, apart, self.factor, f"{graph.prefix}{name}")
        ]

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


def _equal(a: Any, b: Any) -> bool:
    """Whether two outputs are the same bits."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
