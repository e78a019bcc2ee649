"""The long examples in short form: that they run, and that what they say follows from what they did."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def run(name: str, out: Path) -> dict[str, Any]:
    command = [sys.executable, ROOT / "examples" / name, "--out", out, "--short"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=3000, cwd=ROOT)
    found: dict[str, Any] = json.loads(next(out.glob("*.json")).read_text())
    return found


def test_continue_training_example_runs(tmp_path: Path) -> None:
    curves = run("continue_training.py", tmp_path)["curves"]
    learnt, on_merged = curves["LoRA 1"], curves["LoRA 2 on the merged folder"]
    assert learnt[-1][1] < learnt[0][1]
    assert on_merged[0][1:] == pytest.approx(learnt[-1][1:], rel=1e-4)  # the merged folder is where LoRA 1 ended
    assert curves["both merged"][0][1:] == pytest.approx(on_merged[-1][1:], rel=1e-4)
    assert curves["a fresh LoRA"][0] == [len(learnt) and learnt[-1][0], *learnt[0][1:]]
    table = (tmp_path / "continued.md").read_text()
    assert f"| both merged | {curves['both merged'][0][0]} | {math.log(on_merged[-1][1]):.3f} |" in table
    assert (tmp_path / "continued.svg").read_text().count("<svg") == 1


def test_compare_training_example_runs(tmp_path: Path) -> None:
    study = run("compare_training.py", tmp_path)
    assert {m["method"] for m in study["methods"]} == {"lora", "qlora", "adalora", "dora"}
    sizes = {(m["method"], m["rank"]): m["trainable"] for m in study["methods"]}
    assert sizes["lora", 8] == 2 * sizes["lora", 4]
    for one in study["methods"]:
        if one["method"] != "adalora":  # its E starts at zero, and four steps are few
            assert one["curve"][-1][2] < one["curve"][0][2], one["name"]
    assert {(o["dropout"] > 0, o["weight_decay"] > 0) for o in study["overfitting"]} == {
        (False, False), (False, True), (True, False), (True, True),
    }  # fmt: skip
    assert {"study.md", "methods.svg", "overfitting.svg"} <= {p.name for p in tmp_path.iterdir()}
