"""`lora-export benchmark` from its words to its exit codes: arms, grids, refusals, a graph that is really
slower."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import helper, numpy_helper

from lora_export.choices import GRIDS
from lora_export.commands.main import cli
from tests.end_to_end.conftest import Run
from tests.validation.conftest import save_adapter, save_base

QUICK = ["--provider", "cpu", "--prompt-length", 8]


@pytest.fixture(scope="module")
def folders(run_here: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and an adapter of it; exports: the base, unmerged, and with a slot that the adapter is plugged
    into."""
    root = tmp_path_factory.mktemp("benchmark")
    base = save_base(root / "model", torch.float32)
    adapter = save_adapter(base, root / "adapter")
    kinds = {"base": [], "unmerged": ["-a", adapter, "--unmerged"], "plugged": ["-a", adapter]}
    for name, words in kinds.items():
        code, _, talk = run_here("export", "-m", base, *words, "-o", root / name, "--provider", "cpu")
        assert code == 0, talk
    return {path.name: path for path in root.iterdir()}


def test_benchmark_all_arms_are_measured(folders: dict[str, Path], run_here: Run, tmp_path: Path) -> None:
    base = folders["base"]
    words = ["-b", base, "-m", base, "-u", folders["unmerged"], "--plugged", folders["plugged"]]
    words += ["--pytorch", folders["model"], folders["adapter"], "--margin", "50%", "--max-time", "3s", *QUICK]
    code, document, talk = run_here("benchmark", *words, "-o", tmp_path / "out")
    assert code == 0, talk
    names = ["base", "merged", "unmerged", "plugged", "pytorch"]
    (cell,) = (c for c in document["cells"] if c["phase"] == "decode")
    assert list(cell["arms"]) == names and cell["control"] == "unmerged"
    samples = json.loads((tmp_path / "out" / "samples.json").read_text())["b1/p8/decode"]
    assert list(samples) == sorted({*names, "base_again"}, key=list(samples).index)
    for name in names:  # each arm has calls of its own, and its figures are made of them
        times = samples[name] + (samples["base_again"] if name == "base" else [])
        assert len(times) >= cell["pairs"] and all(t > 0 for t in times), name
        assert cell["arms"][name]["p50"]["ms"] == pytest.approx(np.median(times)), name
    assert len({tuple(times) for times in samples.values()}) == len(names) + 1
    assert document["graph_identical"] is True and document["environment"]["margin"] == 0.5
    readings = json.loads((tmp_path / "out" / "conditions.json").read_text())["b1/p8/decode"]
    assert len(readings) == cell["pairs"] > 0


def with_more_work(source: Path, target: Path, times: int) -> Path:
    """The same model with a chain of products by the identity before its logits: slower, and the same numbers."""
    target.mkdir()
    for path in source.iterdir():
        target.joinpath(path.name).write_bytes(path.read_bytes())
    model = onnx.load(target / "model.onnx", load_external_data=False)
    (head,) = [n for n in model.graph.node if n.output[0] == "logits"]
    hidden = head.input[0]
    width = next(t for t in model.graph.initializer if t.name == head.input[1]).dims[0]
    dense = torch.linalg.qr(torch.randn(width, width)).Q.numpy()
    model.graph.initializer.append(numpy_helper.from_array(dense, "rotation"))
    at = list(model.graph.node).index(head)
    for i in range(times):
        node = helper.make_node("MatMul", [hidden, "rotation"], [f"turned_{i}"], name=f"/slow/{i}")
        hidden = node.output[0]
        model.graph.node.insert(at + i, node)
    head.input[0] = hidden
    onnx.save(model, target / "model.onnx")
    return target


def test_benchmark_slower_merged_graph_fails_gate(folders: dict[str, Path], run_here: Run, tmp_path: Path) -> None:
    slow = with_more_work(folders["base"], tmp_path / "slow", 1600)  # many times slower, on any machine
    words = ["-b", folders["base"], "-m", slow, "--margin", "20%", "--max-time", "20s", *QUICK]
    code, document, talk = run_here("benchmark", *words, "-o", tmp_path / "out")
    assert code == 3, talk
    assert document["found"] == "the merged model is slower than the base"
    assert document["where"] == str(tmp_path / "out.failed") and not (tmp_path / "out").exists()
    page = (tmp_path / "out.failed" / "report.html").read_text()
    assert "Failed: do not deploy" in page and "ai.onnx.MatMul: " in page and "/slow/0: only in the other" in page


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-u", "{plugged}"], "this graph computes the base until an adapter is plugged in"),
        (["--plugged", "{base}"], "0 adapters to plug in"),
        (["--beside", "{base}"], "--beside"),
        (["--beside", "merged={base}"], "the arm cannot be named 'merged'"),
        (["--beside", "a b={base}"], "the arm cannot be named 'a b'"),
        (["--grid", "paper"], "--grid with --batch or --prompt-length"),
        (["--sessions", "3"], "--sessions 3"),
    ],
)
def test_benchmark_invalid_arms_and_grids_are_refused(
    folders: dict[str, Path], run_here: Run, tmp_path: Path, words: list[str], expected: str
) -> None:
    given = [word.format(**{name: str(path) for name, path in folders.items()}) for word in words]
    code, document, talk = run_here("benchmark", "-m", folders["base"], *given, *QUICK, "-o", tmp_path / "out")
    assert code == 1 and expected in document["found"], talk
    assert document["next"] and not (tmp_path / "out").exists()


def test_merge_and_export_extra_arms_need_one_adapter(
    folders: dict[str, Path], run_here: Run, tmp_path: Path
) -> None:
    words = ["-b", folders["model"], "-a", f"{folders['adapter']}:0.5", "-o", tmp_path / "out", "--provider", "cpu"]
    code, document, talk = run_here("merge-and-export", *words, "--arm", "plugged")
    assert code == 1 and document["found"] == "--arm plugged with adapter weights 0.5", talk


@pytest.mark.parametrize("option", ["--margin", "--max-time"])
@pytest.mark.parametrize("value", ["", "x", "0", "90%", "1e9m", "nan", "-1s"])
def test_options_invalid_share_or_time_is_usage_error(tmp_path: Path, option: str, value: str) -> None:
    words = ["benchmark", "-m", str(tmp_path), "-o", str(tmp_path / "out"), option, value]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 2 and option in done.output


def test_benchmark_paper_grid_matches_paper() -> None:
    assert GRIDS["paper"] == ((1, 128), (16, 256), (32, 512))


def test_export_unmerged_needs_one_adapter(folders: dict[str, Path], run_here: Run, tmp_path: Path) -> None:
    adapter: Any = folders["adapter"]
    for given in ([], ["-a", adapter, "-a", adapter]):
        code, document, talk = run_here(
            "export", "-m", folders["model"], *given, "--unmerged", "-o", tmp_path / "out"
        )
        assert code == 1 and document["found"] == f"--unmerged with {len(given) // 2} adapters", talk
