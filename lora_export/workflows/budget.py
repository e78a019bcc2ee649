"""The smallest export that keeps enough of the adapter, or the best one of a size: made and measured, not foretold.

The export as it was asked for comes first, and is taken if it will do. Otherwise the same in int8 is made once.
Every further export copies each of its weights from one of the two, or writes it unquantized, so that it costs a
graph and a measurement. None is kept: the one that is chosen is made again at the end, and proven.
"""

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from lora_export.contracts import (
    AdapterChoice,
    BudgetSearch,
    BudgetStep,
    ExportOptions,
    ExportResult,
    Progress,
    QuantizationOptions,
    StoryOptions,
)
from lora_export.errors import ExportError, InputError
from lora_export.progress import Silent
from lora_export.storage.sealed import read_json
from lora_export.workflows.budget_search import Assignment, Climb, Raised, ladder
from lora_export.workflows.run_graphs import export_as, with_graph_of
from lora_export.workflows.validating import pair_of

if TYPE_CHECKING:
    from lora_export.contracts import TensorSource
    from lora_export.onnx_export.quantize.ranking import Group
    from lora_export.validation.meter import Meter

# In config.json of models that texts alone do not run: damage is measured on texts.
NOT_TEXT = (
    "vision_config", "audio_config", "num_mel_bins", "conv_dim", "image_size", "num_channels", "encoder",
)  # fmt: skip
MIXED = ("int4", "int8")  # precisions whose weights can get more bits one by one


@dataclass(frozen=True)
class Models:
    """What is exported. base: the folder that the adapter was trained on; merged: of the merged model, or its
    outline; source: has its numbers, if not the folder; work: for what nobody keeps; output: of the merged
    export."""

    base: Path
    merged: Path
    source: "TensorSource | None"
    work: Path
    output: Path


@dataclass(frozen=True)
class Pair:
    """Exports with one graph."""

    base: ExportResult
    merged: ExportResult


def with_budget(options: StoryOptions, base: Path) -> StoryOptions:
    """The options of a run that searches: with gptq, unless another quantizer is named. InputError for a size that
    cannot be searched for."""
    export = options.export
    refused = _not_searched(options, base)
    if options.max_size is not None and refused:
        raise InputError(
            f"--max-size with {refused}",
            expected="int4 or int8 of a model that reads texts, whose weights can get more bits one by one",
            next_step="the same command without --max-size, or with --precision int4",
        )
    if not searches(options, base) or export.quantization.algorithm != "default":
        return options
    return replace(options, export=replace(export, quantization=replace(export.quantization, algorithm="gptq")))


def searches(options: StoryOptions, base: Path) -> bool:
    """Whether a run looks for the bits of each weight: a share of 0 or no share asks for nothing."""
    wanted = options.max_size is not None or bool(options.validation.min_survival)
    return wanted and not _not_searched(options, base)


def _not_searched(options: StoryOptions, base: Path) -> str:
    """What leaves nothing to choose."""
    export = options.export
    if export.graph_from is not None:
        return "--graph-from, whose graph says the bits of each weight"
    if export.precision not in MIXED:
        return f"--precision {export.precision}"
    if export.quantization.activations != "float":
        return f"--activations {export.quantization.activations}"
    config = read_json(base / "config.json") if (base / "config.json").is_file() else {}
    other = next((name for name in NOT_TEXT if name in config), None)
    return f"a model that reads more than texts ({other} in config.json)" if other else ""


def within_budget(
    models: Models,
    first: Pair,
    base: Path,
    adapters: Sequence[AdapterChoice],
    dequantized: Path | None,
    options: StoryOptions,
    progress: Progress,
) -> tuple[Pair, BudgetSearch]:
    """`first`, or exports with more bits in their place, and what was measured. base, adapters, dequantized: as a
    validation has them. ExportError for a size that is too small."""
    from lora_export.validation.meter import metered

    with metered(
        base, adapters, models.merged,
        dequantized=dequantized, options=options.validation, scratch=models.work, progress=progress,
    ) as meter:  # fmt: skip
        return Search(models, first, options, meter, progress).run()


@dataclass
class Search:
    """One search. first: the exports as they were asked for, the merged one at `models.output`."""

    models: Models
    first: Pair
    options: StoryOptions
    meter: "Meter"
    progress: Progress

    def run(self) -> tuple[Pair, BudgetSearch]:
        """The exports to take, at the places of `first`, and what was measured. ExportError for a size that is too
        small."""
        started = time.monotonic()
        least, most = self.options.validation.min_survival or None, self.options.max_size
        self.progress.stage("budget: what the export keeps of the adapter, measured as validation does it")
        start = self._measured(self.first, (), "as it is")
        if most is not None and start.nbytes > most:
            raise _too_small(most, start.nbytes)
        groups: Sequence[Group] = ()
        steps: tuple[BudgetStep, ...] = (replace(start, chosen=True),)
        pair = self.first
        if start.share is not None and (least is None or not start.keeps(least)):
            self._folder.mkdir()
            self.first = self._moved(self.first, self._folder / "base", self._folder / "merged")
            int8 = self._in_int8()
            groups = self._ranked(int8)
            climb = self._climb(start, groups, int8)
            chosen = climb.fill() if least is None else climb.reach(least)
            steps = climb.steps(chosen)
            pair = self._taken(groups, chosen, int8)
            shutil.rmtree(self._folder)
        touched = sum(g.touched for g in groups)
        return pair, BudgetSearch(least, most, len(groups), touched, steps, round(time.monotonic() - started, 3))

    @property
    def _folder(self) -> Path:
        return self.models.work / "budget"

    # --- exports -----------------------------------------------------------------------------------------------

    def _in_int8(self) -> Pair:
        """All products in int8, as an int4 export has single ones."""
        if self.options.export.precision == "int8":
            return self.first
        self.progress.stage("budget: the same in int8, from which weights are taken")
        options = self._with(eight_bits=("*",))
        return self._made(options, (self.first,), self._folder / "int8-base", self._folder / "int8-merged")

    def _ranked(self, int8: Pair) -> "Sequence[Group]":
        """The groups of weights in the order in which they are raised."""
        from lora_export.onnx_export import tensor_hashes
        from lora_export.onnx_export.quantize.ranking import rank
        from lora_export.onnx_export.quantize.settings import are_statistics

        self.progress.stage("budget: how much damage the rounding of each group of weights does")
        models, plain = self.models, self._folder / "plain"
        options = replace(self._with(), precision="fp32", provider="cpu", quantization=QuantizationOptions())
        export_as(models.merged, plain, options, Silent(), "unquantized", source=models.source, proven=False)
        before, after = (tensor_hashes(e.output) for e in (self.first.base, self.first.merged))
        touched = {name for name, digest in after.items() if before.get(name) != digest}
        texts = self.options.export.quantization.calibration
        texts = None if are_statistics(texts) else texts
        made = self.first.merged.output, int8.merged.output, plain
        groups = rank(*made, models.merged, touched, texts, self.progress)
        shutil.rmtree(plain)
        self.progress.detail(f"{len(groups)} groups of weights, of which the adapter changes {_touched(groups)}")
        return groups

    def _climb(self, start: BudgetStep, groups: "Sequence[Group]", int8: Pair) -> Climb:
        def measure(raised: Assignment) -> BudgetStep:
            step = self._folder / "step"
            step.mkdir()
            options = self._raised(groups, raised)
            pair = self._made(options, (self.first, int8), step / "base", step / "merged")
            found = self._measured(pair, raised, f"of {len(groups)} groups {_words(raised)}")
            shutil.rmtree(step)
            return found

        self.progress.stage("budget: exports with more bits, one after the other")
        return Climb(ladder(groups), _touched(groups), start, measure, self.options.max_size)

    def _taken(self, groups: "Sequence[Group]", chosen: Assignment, int8: Pair) -> Pair:
        """What was chosen, made with its proof where `first` was."""
        places = self.models.work / "base", self.models.output
        if not chosen:
            return self._moved(self.first, *places)
        self.progress.stage("budget: the export that was chosen, made again and proven")
        options = self._raised(groups, chosen)
        return self._made(options, (self.first, int8), *places, proven=True)

    def _made(
        self, options: ExportOptions, ready: Sequence[Pair], base: Path, merged: Path, proven: bool = False
    ) -> Pair:
        models, progress = self.models, self.progress if proven else Silent()
        copied = tuple(p.base.output for p in ready), tuple(p.merged.output for p in ready)
        what = "the base, to compare with"
        graph = export_as(models.base, base, options, progress, what, ready=copied[0], proven=proven)
        return Pair(
            graph,
            with_graph_of(
                graph, models.merged, merged, options, progress, "the merged model", models.source, copied[1]
            ),
        )

    def _with(self, **more: tuple[str, ...]) -> ExportOptions:
        """The options of `first`, with its engine, its graph's optimizations and its statistics, and more patterns
        of quantization."""
        from lora_export.onnx_export.quantize.settings import STATISTICS
        from lora_export.onnx_export.records import read_record

        export, folder = self.options.export, self.first.base.output
        record, how = read_record(folder), export.quantization
        assert record.quantization is not None
        statistics = folder / STATISTICS
        if statistics.is_file():
            how = replace(how, calibration=statistics)
        keep = (*record.quantization.keep, *more.get("keep", ()))
        how = replace(how, keep=keep, eight_bits=(*record.quantization.eight_bits, *more.get("eight_bits", ())))
        return replace(export, engine=record.engine, optimize=record.optimize, quantization=how)

    def _raised(self, groups: "Sequence[Group]", raised: Assignment) -> ExportOptions:
        from lora_export.onnx_export.quantize.settings import escaped

        named = {to: {t for r in raised if r.to == to for t in groups[r.group].tensors} for to in get_args(Raised)}
        kept = named["unquantized"]
        return self._with(eight_bits=escaped(named["int8"] - kept), keep=escaped(kept))

    @staticmethod
    def _moved(pair: Pair, base: Path, merged: Path) -> Pair:
        from lora_export.onnx_export import load_export

        return Pair(load_export(pair.base.output.rename(base)), load_export(pair.merged.output.rename(merged)))

    # --- measuring ---------------------------------------------------------------------------------------------

    def _measured(self, pair: Pair, raised: Assignment, what: str) -> BudgetStep:
        kept = self.meter.measure(pair_of(pair.merged, pair.base.output))
        whole = {r.group for r in raised if r.to == "unquantized"}
        eight = {r.group for r in raised} - whole
        step = BudgetStep(
            nbytes=pair.merged.nbytes,
            in_int8=len(eight),
            unquantized=len(whole),
            share=kept.share,
            uncertainty=kept.uncertainty,
            kl_lost=kept.kl_lost,
            kl_allowed=kept.kl_allowed,
            perplexity=kept.perplexity,
        )
        self.progress.detail(_told(step, what))
        return step


def _touched(groups: "Sequence[Group]") -> int:
    return sum(group.touched for group in groups)


def _words(raised: Assignment) -> str:
    whole = {r.group for r in raised if r.to == "unquantized"}
    eight = {r.group for r in raised} - whole
    parts = [(len(eight), "in int8"), (len(whole), "unquantized")]
    return ", ".join(f"{count} {how}" for count, how in parts if count)


def _told(step: BudgetStep, what: str) -> str:
    share = "no effect of the adapter to keep" if step.share is None else f"keeps {step.share:.2%}"
    if not math.isnan(step.uncertainty):
        share += f" ± {step.uncertainty:.2%} of the adapter"
    more = f", KL {step.kl_lost:.4f}" if step.kl_lost is not None else ""
    more += f", perplexity {step.perplexity:.2f}" if step.perplexity is not None else ""
    return f"{step.nbytes / 1e6:.1f} MB, {what}: {share}{more}"


def _too_small(most: int, nbytes: int) -> ExportError:
    return ExportError(
        f"the smallest export has {nbytes / 1e6:.1f} MB, and --max-size is {most / 1e6:.1f} MB",
        expected=f"--max-size {-(-nbytes // 10**6)}MB or more",
        next_step="the same command with that size, --precision int4, or larger blocks (--block-size 128)",
    )
