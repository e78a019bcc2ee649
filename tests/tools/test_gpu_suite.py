"""The GPU suite without a GPU: its order, needs and budget, what it goes on from, and what it never passes over."""

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper

ROOT = Path(__file__).parents[2]
ORDER = ["placement", "merged", "unmerged", "optimum", "int4", "diffusion", "qmoe", "gptq", "fp8"]


def tool(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module(name)


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    yield tool("gpu_suite", monkeypatch)
    for name in ("gpu_suite", "gpu_steps", "processes"):
        sys.modules.pop(name, None)


def plan(suite: ModuleType, folder: Path, provider: str = "cuda", sizes: str = "real") -> Any:
    half = "fp16" if provider == "cuda" else "fp32"
    return suite.Plan(folder / "work", folder / "results", provider, sizes, half, 60)


def writing(path: Path, text: str = "{}", status: int = 0) -> tuple[str, ...]:
    code = f"import pathlib, sys; p = pathlib.Path({str(path)!r}); p.parent.mkdir(parents=True, exist_ok=True); "
    return "-c", code + f"p.write_text({text!r}); print('told'); sys.exit({status})"


# --- the steps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("provider", "more"), [("cuda", ["devices", "tests", "large"]), ("cpu", ["large"])])
def test_steps_most_valuable_come_first(provider: str, more: list[str], suite: ModuleType, tmp_path: Path) -> None:
    assert [step.name for step in plan(suite, tmp_path, provider).steps()] == [*ORDER, *more]


@pytest.mark.parametrize("provider", ["cuda", "cpu"])
@pytest.mark.parametrize("sizes", ["real", "small", "tiny"])
def test_steps_need_what_is_made_and_all_of_it_is_needed(
    sizes: str, provider: str, suite: ModuleType, tmp_path: Path
) -> None:
    made = plan(suite, tmp_path, provider, sizes)
    everything, used = made.everything_made(), set[str]()
    waiting = [name for step in made.steps() for name in (*step.needs, *step.extra)]
    while waiting:
        name = waiting.pop()
        if name not in used:
            used.add(name)
            waiting += everything[name].needs
    assert used >= everything.keys() - {"large fp16 plugged", "large fp32 plugged"}


def test_steps_and_carrying_fit_into_half_an_hour(suite: ModuleType, tmp_path: Path) -> None:
    made = plan(suite, tmp_path)
    carried = [made.at(name.replace("-", " ")) for name in ("unet-graph", "optimum-graph")]
    for folder in carried:
        folder.mkdir(parents=True)
    needed = {
        m.name: m.seconds for step in made.steps() for m in suite.Suite(made, None, False)._needed(step.needs)
    }
    assert sum(needed.values()) + sum(step.seconds for step in made.steps()) <= 1800


def test_steps_run_every_file_with_gpu_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {p for p in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in p.read_text(encoding="utf-8")}
    files.discard(Path(__file__))
    assert {str(p.relative_to(ROOT / "tests")) for p in files} == set(tool("gpu_steps", monkeypatch).TESTS)


# --- budget, failures, going on ----------------------------------------------------------------------------------


def test_suite_leaves_out_what_does_not_fit_and_goes_on_later(
    suite: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = plan(suite, tmp_path)
    made.results.mkdir()
    long, short = (
        suite.Step(name, name, seconds, (writing(made.result(name) / "result.json"),))
        for name, seconds in (("long", 500), ("short", 1))
    )
    first = suite.Suite(made, 60.0, False)
    first.run([long, short])
    assert suite.result_of(made, long) is None and suite.result_of(made, short)
    assert first.missed == {"long": "it takes about 500 s, and 60 s are left"}
    told = json.loads((made.results / "suite.json").read_text())
    assert told["without_result"] == first.missed and set(told["seconds"]) == {"short"}
    second = suite.Suite(made, None, False)
    second.run([long, short])
    assert second.missed == {} and "short: there already" in capsys.readouterr().out
    step = json.loads((made.result("long") / "step.json").read_text())
    assert step["machine"]["cpu"] and step["date"] and step["versions"] and "stand_in" not in step


def test_suite_tells_a_failure_and_goes_on(suite: ModuleType, tmp_path: Path) -> None:
    """A need that fails, and what depends on it; a gate that fails is a result."""
    made = plan(suite, tmp_path)
    made.results.mkdir()
    broken = suite.Made("broken", 1, (writing(tmp_path / "x", status=1),))
    needs = suite.Step("needs", "", 1, (writing(made.result("needs") / "result.json"),), ("broken",))
    slower = suite.Step("slower", "", 1, (writing(tmp_path / "results/slower.failed/report.json", status=3),))
    failed = suite.Step("failed", "", 1, (writing(made.result("failed") / "result.json", status=1),))
    runs = suite.Suite(made, None, True)
    runs.made = {"broken": broken}
    runs.run([needs, slower, failed])
    assert runs.missed == {
        k: f"{v} failed with status 1: told" for k, v in {"needs": "broken", "failed": "failed"}.items()
    }
    assert suite.result_of(made, failed) is None and (made.results / "failed.broken" / "result.json").is_file()
    assert suite.result_of(made, slower) == tmp_path / "results" / "slower.failed"
    step = json.loads((tmp_path / "results" / "slower.failed" / "step.json").read_text())
    assert step["stand_in"] == "CUDA was played by the CPU: no figure here is one of a GPU"


def test_suite_goes_without_an_arm_that_cannot_be_made(suite: ModuleType, tmp_path: Path) -> None:
    made = plan(suite, tmp_path)
    made.results.mkdir()
    runs = suite.Suite(made, None, False)
    runs.made = {
        "bad": suite.Made("bad", 1, (writing(tmp_path / "x", status=1),)),
        "good": suite.Made("good", 1, (writing(made.at("good") / "y"),)),
    }
    write = "import sys, pathlib; p = pathlib.Path(sys.argv[1]); p.parent.mkdir(); p.write_text(str(sys.argv[2:]))"
    command = ("-c", write, str(made.result("step") / "result.json"))
    runs.run([suite.Step("step", "", 1, (command,), (), {"bad": ("--bad",), "good": ("--good", "word")})])
    assert (made.result("step") / "result.json").read_text() == "['--good', 'word']"
    assert runs.missed == {} and runs.absent == {"bad": "bad failed with status 1: told"}
    told = json.loads((made.results / "suite.json").read_text())
    assert told["absent"] == runs.absent and "bad" not in str(told["seconds"])


def test_suite_stops_what_outlasts_the_budget(suite: ModuleType, tmp_path: Path) -> None:
    made = plan(suite, tmp_path)
    made.results.mkdir()
    runs = suite.Suite(made, 0.5, False)
    runs.run([suite.Step("slow", "", 0, (("-c", "import time; time.sleep(60)"),))])
    assert runs.missed == {"slow": "slow was stopped at the end of the budget"}


def test_suite_goes_on_from_an_archive(suite: ModuleType, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    (one / "merged").mkdir(parents=True)
    (one / "merged" / "report.json").write_text("first")
    (one / "suite.json").write_text('{"seconds": {"merged": 3.0}}')
    suite.archived(one, tmp_path / "back" / "results.tar.xz")
    other.mkdir()
    suite.restored(tmp_path / "back" / "results.tar.xz", other)
    assert (other / "merged" / "report.json").read_text() == "first"
    made = replace(plan(suite, tmp_path), results=other)
    assert suite.result_of(made, suite.Step("merged", "", 1, ()))
    assert suite.Suite(made, None, False).seconds == {"merged": 3.0}


def test_suite_refuses_a_gpu_that_does_not_work(suite: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_export import runtime

    monkeypatch.setattr(runtime, "why_not", lambda provider: "libcublasLt.so.13: cannot open")
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py"])
    with pytest.raises(SystemExit, match=r"libcublasLt.so.13: cannot open\ninstall the NVIDIA driver"):
        suite.planned(suite.parse())


def test_suite_names_missing_packages(suite: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert suite.missing() == []
    real = suite.importlib.metadata.version
    monkeypatch.setattr(suite.importlib.metadata, "version", lambda n: "1.0" if n == "transformers" else real(n))
    assert [told.partition(">")[0] for told in suite.missing()] == ["transformers"]


# --- graphs without weights, and the way to the machine --------------------------------------------------------


def test_graph_without_weights_is_filled_from_a_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inputs = tool("gpu_inputs", monkeypatch)
    weights = [
        numpy_helper.from_array(np.ones((40, 32), np.float16), "w"), numpy_helper.from_array(np.arange(400), "n"),
        numpy_helper.from_array(np.ones(600, np.float16), "scale"), numpy_helper.from_array(np.float32(2), "small"),
    ]  # fmt: skip
    x = h.make_tensor_value_info("x", T.FLOAT16, ["b", 40])
    y = h.make_tensor_value_info("y", T.FLOAT16, ["b", 32])
    graph = h.make_graph([h.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], weights)
    onnx.save(h.make_model(graph), tmp_path / "model.onnx")
    inputs.strip(tmp_path / "model.onnx", tmp_path / "stripped")
    assert [p.name for p in (tmp_path / "stripped").iterdir()] == ["model.onnx"]
    for seed in (1, 1, 2):
        inputs.fill(tmp_path / "stripped", tmp_path / f"filled{len(list(tmp_path.iterdir()))}", seed)
    found = [onnx.load(p / "model.onnx") for p in sorted(tmp_path.glob("filled*"))]
    arrays = [{t.name: numpy_helper.to_array(t) for t in m.graph.initializer} for m in found]
    assert (arrays[0]["w"] == arrays[1]["w"]).all() and (arrays[0]["w"] != arrays[2]["w"]).any()
    assert arrays[0]["w"].shape == (40, 32) and 0.01 < arrays[0]["w"].std() < 0.03
    assert abs(arrays[0]["scale"].mean() - 1) < 0.01
    assert (arrays[0]["n"] == np.arange(400)).all() and arrays[0]["small"] == 2


def test_carried_parts_come_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    carry = tool("gpu_carry", monkeypatch)
    for name in carry.GRAPHS:
        (tmp_path / "graphs" / name).mkdir(parents=True)
        (tmp_path / "graphs" / name / "model.onnx").write_text(name)
    with carry.tarfile.open(tmp_path / "packed.tar", "w") as file:
        file.add(tmp_path / "graphs", "graphs")
    parts = carry.cut(tmp_path / "packed.tar", tmp_path, 4000)
    assert len(parts) == 3 and all((p / "data").stat().st_size <= 4000 for p in parts)
    told = carry.calls(parts)
    assert [line for line in told if "gpu_suite.py" in line and "part-02" in line]
    store = ["--store", str(tmp_path / "store"), "--work", str(tmp_path / "work"), "--no-install"]

    def keep(part: Path) -> int | str | None:
        monkeypatch.setattr(sys, "argv", ["gpu_carry.py", "keep", str(part), *store])
        try:
            carry.main()
        except SystemExit as ended:
            return ended.code
        return 0

    assert keep(parts[0]) == 0 and keep(parts[2]) == 1, "the last part says that one is missing"
    assert not (tmp_path / "work").exists()
    keep(parts[1])
    assert keep(parts[2]) == 0
    for name in carry.GRAPHS:
        assert (tmp_path / "work" / "real-cuda" / name / "model.onnx").read_text() == name
    (parts[0] / "data").write_bytes(b"other")
    assert "is not what its manifest says" in str(keep(parts[0]))
