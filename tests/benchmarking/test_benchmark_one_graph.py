"""Studies on a clock that only played arms move: identical graphs, and graphs that are slower in some shapes."""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_export import benchmarking
from lora_export.benchmarking import study
from lora_export.benchmarking.arms import OpenedArms
from lora_export.benchmarking.buffers import Buffers, Shape
from lora_export.benchmarking.measure import CHECK_BLOCKS
from lora_export.benchmarking.sessions import Bound
from lora_export.benchmarking.statistics import MIN_BLOCKS
from lora_export.contracts import BenchmarkArm, BenchmarkOptions, BenchmarkResult, GraphComparison
from lora_export.progress import Silent

from .machine import Machine, Noise

Ratio = Callable[[Shape], float]
QUIET, LOUD = Noise(own=0.002), Noise(own=0.2)
ONE = GraphComparison(True, "a" * 64, "a" * 64, 9, {"CPUExecutionProvider": 9})
TWO = replace(ONE, identical=False, merged_sha256="b" * 64)


@dataclass
class Played:
    """An arm whose calls take as long as its shape and its ratio say. session: factor of this session alone."""

    machine: Machine
    ratio: Ratio
    session: float = 1.0
    device = "cpu"
    is_decoder = True
    is_denoiser = False

    def call(self, shape: Shape, buffers: Buffers, graph_id: int = 1, seed: int = 0) -> Bound:
        size = shape.batch * shape.tokens / 1024
        return Bound(self.machine.arm(size * self.ratio(shape) * self.session), kv_in_place=True)


@dataclass
class Plan:
    """ratios: arm → its latency over the base's; slow: number of merged's session → a factor of its own."""

    ratios: Mapping[str, Ratio]
    noise: Noise = QUIET
    slow: Mapping[int, float] | None = None


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[BenchmarkResult, list[str]]]:
    """Runs a study of arms that are played, and says which were opened."""

    def run(plan: Plan, graph: GraphComparison | None, **options: Any) -> tuple[BenchmarkResult, list[str]]:
        machine, opened = Machine(np.random.default_rng(3), plan.noise), []

        def open_(self: OpenedArms, arm: BenchmarkArm, part: int) -> Played:
            opened.append(arm.name)
            factor = (plan.slow or {}).get(sum(name == arm.name for name in opened), 1.0)
            own = factor if arm.name == "merged" else 1.0
            return Played(machine, plan.ratios.get(arm.name, lambda shape: 1.0), own)

        monkeypatch.setattr(OpenedArms, "_open", open_)
        for name in ("measure", "check"):
            monkeypatch.setattr(study, name, functools.partial(getattr(study, name), clock=lambda: machine.now))
        arms = [BenchmarkArm(name, (Path(f"{name}.onnx"),)) for name in ("base", "merged", "unmerged")]
        asked = BenchmarkOptions(provider="cpu", **options)
        return benchmarking.run(arms, options=asked, progress=Silent(), graph=graph), opened

    return run


def same(shape: Shape) -> float:
    return 1.0


def control(shape: Shape) -> float:
    return 1.2


# --- graphs that differ: what nobody asked about is measured, too -------------------------------------------------


@pytest.mark.parametrize(
    ("slow", "cells"),
    [
        (lambda s: 1.1 if s.batch == 8 else 1.0, {(8, 128), (8, 1024)}),
        (lambda s: 1.1 if s.total >= 1024 else 1.0, {(1, 1024), (8, 1024)}),
        (lambda s: 1.1 if s.batch == 8 and s.tokens == 1 and s.total > 1000 else 1.0, {(8, 1024)}),
    ],
    ids=["at batch 8", "at 1,024 tokens", "in a step of both"],
)
def test_run_graph_slower_in_some_shapes_is_found_by_default(played: Any, slow: Ratio, cells: set[Any]) -> None:
    plan = Plan({"merged": slow, "unmerged": control})
    found, _ = played(plan, TWO)
    assert found.verdict == "slower"
    assert {(c.batch, c.prompt) for c in found.cells if c.verdict == "slower"} == cells
    assert any("grid standard" in note for note in found.notes)
    quick, _ = played(plan, TWO, shapes=((1, 128),))  # what was asked for is what is measured, and no more is said
    assert quick.verdict == "equivalent" and {(c.batch, c.prompt) for c in quick.cells} == {(1, 128)}


def test_run_graphs_that_were_not_compared_are_measured_in_the_standard_grid(played: Any) -> None:
    found, _ = played(Plan({"unmerged": control}), None)
    assert len(found.cells) == 8 and found.verdict == "equivalent" and not found.ended_early


# --- one graph ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [
        Plan({"unmerged": control}),
        Plan({"unmerged": control}, LOUD),
        Plan({"unmerged": same}),
        Plan({"unmerged": control, "merged": lambda s: 0.8}),
    ],
    ids=["quiet", "noisy", "failed control", "merged faster"],
)
def test_run_one_graph_is_checked_and_equivalent_by_structure(played: Any, plan: Plan) -> None:
    found, opened = played(plan, ONE)
    assert found.verdict == "equivalent_by_structure" and found.ended_early and found.graph_identical
    assert [c.verdict for c in found.cells] == ["equivalent_by_structure"] * 2
    assert [(c.batch, c.prompt) for c in found.cells] == [(1, 128)] * 2
    assert all(CHECK_BLOCKS <= c.pairs <= MIN_BLOCKS and c.ratio and c.ci_low and c.ci_high for c in found.cells)
    assert sum(len(t) for arms in found.samples.values() for t in arms.values()) == 4 * sum(
        c.pairs for c in found.cells
    )
    assert sorted(opened) == ["base", "base", "merged", "unmerged"]  # and no session that nobody times
    assert any("ended once it was not slower, and --max-time" in note for note in found.notes)
    assert not any("no test at" in note for note in found.notes)


def test_run_one_graph_in_slow_calls_ends_after_few_blocks(played: Any) -> None:
    found, _ = played(Plan({name: lambda s: 50.0 for name in ("base", "merged", "unmerged")}), ONE)
    assert [c.pairs for c in found.cells if c.phase == "prefill"] == [CHECK_BLOCKS]


def test_run_one_graph_slower_in_every_session_is_slower(played: Any) -> None:
    found, opened = played(Plan({"merged": lambda s: 1.2, "unmerged": control}), ONE)
    assert found.verdict == "slower" and not found.ended_early
    assert opened.count("merged") == 3  # once for both cells, and again for each that was doubted
    for cell in found.cells:  # in full: several calls a block
        assert cell.pairs >= MIN_BLOCKS and len(found.samples[cell.key]["merged"]) > cell.pairs


@pytest.mark.parametrize("seconds", [None, 60.0])
def test_run_one_graph_slower_in_one_session_only_is_equivalent_by_structure(played: Any, seconds: float) -> None:
    found, opened = played(Plan({"unmerged": control}, slow={1: 1.2}), ONE, max_seconds=seconds)
    assert [c.verdict for c in found.cells] == ["equivalent_by_structure"] * 2
    assert opened.count("merged") == 3
    for cell in found.cells:
        assert re.match(r"merged was slower in one pair of sessions \(ratio 1\.(19|20)", cell.reason)
        assert "the sessions differ, not the graphs" in cell.reason and cell.ratio < 1.01


def test_run_one_graph_measured_in_full_is_equivalent_where_its_test_passed(played: Any) -> None:
    found, _ = played(Plan({"unmerged": control}), ONE, max_seconds=60.0)
    assert found.verdict == "equivalent" and not found.ended_early
    assert all(c.pairs >= MIN_BLOCKS and not c.reason for c in found.cells)


@pytest.mark.parametrize(
    ("plan", "seconds", "reason"),
    [
        (Plan({"unmerged": control}, LOUD), 2.0, "the noise floor"),
        (Plan({"unmerged": same}), 60.0, "the positive control failed"),
        (Plan({"unmerged": control, "merged": lambda s: 0.8}), 60.0, "merged was faster by more than the margin"),
        (Plan({"unmerged": control}), 0.0, "at least 15 are needed"),
    ],
)
def test_run_one_graph_measured_in_full_says_why_no_test_is_claimed(
    played: Any, plan: Plan, seconds: float, reason: str
) -> None:
    found, _ = played(plan, ONE, max_seconds=seconds)
    assert found.verdict == "equivalent_by_structure" and not found.ended_early
    for cell in found.cells[:1]:  # a step is so short that its calls are many, and their noise is little
        assert cell.reason.startswith("no test at ±1.00% is claimed: ") and reason in cell.reason
    assert any(reason in note for note in found.notes)
