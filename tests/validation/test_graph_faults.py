"""Faults of an exporter that the merged model's graph shares with the base's: each must fail a check."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.validation.graphs.models import MODELS, Workshop
from tests.validation.graphs.trial import Bench

ROOT = Path(__file__).resolve().parents[2]
BERT = next(tiny for tiny in MODELS if tiny.cls == "BertForSequenceClassification")
DAILY = ("attention scale", "epsilon", "padding alone", "type", "swapped inputs", "beyond N tokens")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("graphs")
    return Bench(Workshop(root / "made"), BERT, "fp32", root / "spoiled")


@pytest.mark.parametrize("kind", DAILY)
def test_validate_graph_fault_shared_with_the_base_fails(bench: Bench, kind: str) -> None:
    drawn = bench.draw(kind, random.Random(kind))
    assert drawn is not None
    verdict = bench.judge(drawn.merged, drawn.base)
    assert bench.caught(verdict), (drawn.fault.words, drawn.effect, verdict.checks)


def test_validate_honest_graph_passes(bench: Bench) -> None:
    assert not bench.alarms()


@pytest.mark.slow
def test_graph_faults_tool_sixty_faults_and_honest_exports_meet_the_bars(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "tools" / "graph_faults.py", "--out", tmp_path / "found.json"]
    done = subprocess.run([*map(str, command), "--work", str(tmp_path)], env=os.environ | {"PYTHONPATH": str(ROOT)})
    summary = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["summary"]
    assert done.returncode == 0, summary
    assert (summary["faults"], summary["honest"]) == (60, 60)
