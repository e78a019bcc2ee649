"""The whole story on a tiny model: every stage real, in half a minute."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.end_to_end.conftest import Run
from tests.validation.conftest import save_adapter, save_base


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("story")
    base = save_base(root / "base", torch.float32)
    return base, save_adapter(base, root / "adapter")


@pytest.fixture(scope="module")
def story(inputs: tuple[Path, Path], run_here: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    base, adapter = inputs
    out = tmp_path_factory.mktemp("out") / "run"
    words = ["--provider", "cpu", "--max-time", "3s", "--prompt-length", 8, "--margin", "50%"]
    arms = ["--arm", "plugged", "--arm", "pytorch"]
    code, document, talk = run_here("merge-and-export", "-b", base, "-a", adapter, "-o", out, *words, *arms)
    assert code == 0, talk
    return out, document


def test_merge_and_export_json_has_one_key_per_stage(story: tuple[Path, Any]) -> None:
    out, document = story
    assert document["output"] == str(out)
    assert document["merge"]["tensors"]["updated"] == 8
    assert document["merge"]["adapter_tensors"] == {"used": 16, "total": 16}
    assert document["validate"]["passed"]
    assert document["export"]["engine"] == "genai"
    assert document["benchmark"]["graph_identical"] is True
    assert document["benchmark"]["provider"] == "cpu"
    assert document["benchmark"]["verdict"] in ("equivalent", "equivalent_by_structure")
    for cell in document["benchmark"]["cells"]:
        assert list(cell["arms"]) == ["base", "merged", "unmerged", "plugged", "pytorch"]
        assert cell["kv_in_place"] and cell["control"] == "unmerged"
    graph = document["benchmark"]["graph"]
    assert graph["base_sha256"] == graph["merged_sha256"] and not graph["warnings"]
    names = {c["name"] for c in document["validate"]["checks"]}
    contract = {
        "logits_max_abs", "logits_kl_mean", "top1_agreement", "perplexity_unmerged", "perplexity_merged",
        "greedy_agreement", "noise_floor_max_abs",
    }  # fmt: skip
    assert contract | {f"onnx_{n}" for n in contract} <= names
    measured = {p["model"]: p["value"] for p in document["validate"]["perplexities"]}
    assert list(measured) == ["base", "unmerged", "merged", "onnx fp32 base", "onnx fp32"]
    assert measured["onnx fp32"] == pytest.approx(measured["unmerged"], rel=1e-3)
    assert measured["base"] != pytest.approx(measured["unmerged"], rel=1e-3)


def test_merge_and_export_leaves_documented_files(story: tuple[Path, Any]) -> None:
    out, _ = story
    assert {p.name for p in out.iterdir()} == {"merged", "onnx", "report", "manifest.json"}
    assert {p.name for p in (out / "report").iterdir()} == {
        "report.json", "report.html", "report.md", "samples.json", "conditions.json",
    }  # fmt: skip
    assert not list(out.parent.glob(".*"))
    manifest = json.loads((out / "manifest.json").read_text())
    on_disk = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert set(manifest["files"]) == on_disk - {"manifest.json"}


def test_merge_and_export_output_names_no_machine(story: tuple[Path, Any], inputs: tuple[Path, Path]) -> None:
    out, _ = story
    names = ("manifest.json", "report/report.json", "report/report.html", "merged/lora_export_certificate.json")
    for name in names:
        assert str(inputs[0].parent) not in (out / name).read_text(), name


def test_merge_and_export_existing_run_is_kept(
    story: tuple[Path, Any], inputs: tuple[Path, Path], run: Run
) -> None:
    out, _ = story
    before = (out / "manifest.json").read_bytes()
    code, document, talk = run("merge-and-export", "-b", inputs[0], "-a", inputs[1], "-o", out)
    assert code == 1
    assert "--force" in talk and document["where"] == str(out)
    assert (out / "manifest.json").read_bytes() == before


@pytest.mark.slow
def test_stages_work_on_output_of_run(
    story: tuple[Path, Any], inputs: tuple[Path, Path], run: Run, tmp_path: Path
) -> None:
    out, _ = story
    base, adapter = inputs
    code, document, talk = run(
        "validate", "-b", base, "-a", adapter, "-m", out / "merged", "--onnx", out / "onnx", "--provider", "cpu"
    )
    assert code == 0 and document["passed"], talk
    assert any(c["name"] == "onnx_logits_max_abs" for c in document["checks"])
    code, document, talk = run("export", "-m", base, "-o", tmp_path / "base", "--provider", "cpu")
    assert code == 0 and document["nodes"] > 0, talk
    words = ["-b", tmp_path / "base", "-m", out / "onnx", "--provider", "cpu", "--max-time", "3s"]
    grid = ["--prompt-length", 8, "--batch", 1, "--batch", 2, "--beside", f"again={out / 'onnx'}"]
    code, document, talk = run("benchmark", *words, *grid, "-o", tmp_path / "latency")
    assert code == 0 and document["graph_identical"] is True, talk
    assert {(c["batch"], c["phase"]) for c in document["cells"]} == {
        (batch, phase) for batch in (1, 2) for phase in ("prefill", "decode")
    }
    assert list(document["cells"][0]["arms"]) == ["base", "merged", "again", "delayed"]
    code, document, _ = run("report", out, "--compare", tmp_path / "latency")
    beside = out.with_name(f"{out.name}-vs-latency")
    assert code == 0 and Path(document["html"]).parent == beside
    assert "Compared with another run" in (beside / "report.html").read_text()
    code, document, _ = run("report", out, "--compare", tmp_path / "latency", "-o", out / "report" / "both")
    assert code == 1 and not (out / "report" / "both").exists()
    code, document, _ = run("report", out)
    assert code == 0 and Path(document["html"]).is_file()
    code, document, _ = run("verify", out)
    assert code == 0, document
    code, document, _ = run("inspect", out)
    assert code == 0 and document["kind"] == "run" and document["status"] == "passed"


@pytest.mark.slow
def test_merge_and_export_bfloat16_base_passes(run: Run, tmp_path: Path) -> None:
    """The merged weights are rounded to bfloat16, and the ONNX graph carries that rounding, too."""
    base = save_base(tmp_path / "base", torch.bfloat16)
    adapter = save_adapter(base, tmp_path / "adapter")
    words = ["--provider", "cpu", "--max-seconds", 1, "--prompt-length", 8, "--margin", 0.5]
    code, document, talk = run("merge-and-export", "-b", base, "-a", adapter, "-o", tmp_path / "run", *words)
    assert code == 0, talk
    assert document["merge"]["dtype"] == "bfloat16"
    found = {c["name"]: c["value"] for c in document["validate"]["checks"]}
    assert found["onnx_noise_floor_max_abs"] > found["noise_floor_max_abs"] > 1e-3


@pytest.mark.slow
def test_merge_and_export_lost_adapter_is_kept_aside(inputs: tuple[Path, Path], run: Run, tmp_path: Path) -> None:
    base, adapter = inputs
    words = ["--provider", "cpu", "--precision", "int4", "--min-survival", 1]
    code, document, talk = run("merge-and-export", "-b", base, "-a", adapter, "-o", tmp_path / "run", *words)
    assert code == 3, talk
    assert "onnx_adapter_survival" in document["found"]
    assert document["next"].endswith("the same command with --precision int8")
    report = json.loads((tmp_path / "run.failed" / "report" / "report.json").read_text())
    assert report["validate"]["advice"] == [document["next"]]
    assert report["validate"]["adapter_survival"][0]["model"] == "onnx int4"


def test_merge_and_export_failed_gate_is_kept_aside(
    inputs: tuple[Path, Path], run_here: Run, tmp_path: Path
) -> None:
    """A number that is none, and leave to take it: no output is what it should be."""
    base, adapter = inputs
    spoiled = tmp_path / "adapter"
    spoiled.mkdir()
    for path in adapter.iterdir():
        spoiled.joinpath(path.name).write_bytes(path.read_bytes())
    tensors = load_file(spoiled / "adapter_model.safetensors")
    next(t for name, t in sorted(tensors.items()) if "lora_B" in name)[0, 0] = float("nan")
    save_file(tensors, spoiled / "adapter_model.safetensors")
    words = ["--provider", "cpu", "--allow-nonfinite"]
    code, _, talk = run_here("merge-and-export", "-b", base, "-a", spoiled, "-o", tmp_path / "run", *words)
    assert code == 3, talk
    assert not (tmp_path / "run").exists()
    failed = tmp_path / "run.failed"
    assert "validation failed" in (failed / "FAILED").read_text()
    assert json.loads((failed / "report" / "report.json").read_text())["status"] == "failed"


@pytest.mark.slow
def test_merge_and_export_combined_adapters_pass(
    inputs: tuple[Path, Path], run: Run, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """TIES of two adapters: merged, exported, validated against PEFT, reported, verified."""
    base, adapter = inputs
    root = tmp_path_factory.mktemp("combined")
    other, out = save_adapter(base, root / "other", seed=7), root / "run"
    words = ["--provider", "cpu", "--max-time", "6s", "--prompt-length", 8, "--margin", "50%"]
    chosen = ["-a", f"{adapter}:0.7", "-a", f"{other}:0.3"]
    how = ["--combine", "ties", "--density", 0.4]
    code, document, talk = run("merge-and-export", "-b", base, *chosen, *how, "-o", out, *words)
    assert code == 0, talk
    assert document["validate"]["passed"] and document["benchmark"]["graph_identical"] is True
    overall = document["merge"]["interference"][0]
    assert overall["tensor"] is None and {overall["first"], overall["second"]} == {"adapter", "other"}
    assert any("exactly one adapter" in note for note in document["benchmark"]["notes"])
    report = json.loads((out / "report" / "report.json").read_text())
    assert sum(r["kinds"] == ["ties of lora + lora"] for r in report["merge"]["records"]) == 8
    assert report["options"]["merge"]["combine"] == "ties"
    code, verified, talk = run("verify", out, "-b", base, *chosen)
    assert code == 0 and verified["verified"], talk
