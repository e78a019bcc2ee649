"""merge-and-export without a merged folder, and with the graph of an earlier run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_export.contracts import AdapterChoice, ExportOptions, Source, StoryOptions
from lora_export.errors import GateFailed
from lora_export.pipeline import merge_and_export
from lora_export.progress import Silent
from lora_export.storage.sealed import read_sealed, sha256, write_sealed
from tests.end_to_end.conftest import Run
from tests.validation.conftest import save_adapter, save_base

WORDS = ("--provider", "cpu", "--max-seconds", 1, "--prompt-length", 8, "--margin", 0.5)
CERTIFICATE = "lora_export_certificate.json"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("story")
    base = save_base(root / "base", torch.bfloat16)
    return base, save_adapter(base, root / "adapter")


@pytest.fixture(scope="module")
def plain(inputs: tuple[Path, Path], run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "run"
    code, _, talk = run("merge-and-export", "-b", inputs[0], "-a", inputs[1], "-o", out, *WORDS)
    assert code == 0, talk
    return out


@pytest.fixture(scope="module")
def streamed(
    inputs: tuple[Path, Path], run: Run, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("streamed") / "run"
    words = ["-b", inputs[0], "-a", inputs[1], "-o", out, "--no-merged-folder", *WORDS]
    code, document, talk = run("merge-and-export", *words)
    assert code == 0, talk
    return out, document


def test_one_pass_export_equals_export_of_merged_folder(plain: Path, streamed: tuple[Path, dict[str, Any]]) -> None:
    out, document = streamed
    assert {p.name for p in out.iterdir()} == {"onnx", "report", "manifest.json", CERTIFICATE}
    names = {p.name for p in (plain / "onnx").iterdir()} - {"export.json"}
    assert names == {p.name for p in (out / "onnx").iterdir()} - {"export.json"}
    assert {n: sha256(out / "onnx" / n) for n in names} == {n: sha256(plain / "onnx" / n) for n in names}
    assert document["merge"]["certificate"] == str(out / CERTIFICATE)
    assert document["merge"]["adapter_tensors"] == {"used": 16, "total": 16}


def test_one_pass_certificate_equals_that_of_merged_folder(
    plain: Path, streamed: tuple[Path, dict[str, Any]]
) -> None:
    own, other = (json.loads((p / CERTIFICATE).read_text()) for p in (streamed[0], plain / "merged"))
    assert own["records"] == other["records"]
    assert own["delta_survival"] == other["delta_survival"]
    assert own["options"] == other["options"]


def test_one_pass_validates_only_graph(streamed: tuple[Path, dict[str, Any]]) -> None:
    validated = streamed[1]["validate"]
    assert validated["passed"]
    names = {c["name"] for c in validated["checks"]}
    assert {"onnx_logits_max_abs", "onnx_greedy_agreement", "onnx_adapter_survival"} <= names
    assert all(name.startswith("onnx_") for name in names)


def test_verify_one_pass_compares_export_with_certificate(streamed: tuple[Path, dict[str, Any]], run: Run) -> None:
    out = streamed[0]
    code, document, _ = run("verify", out)
    assert code == 0 and document["verified"]
    assert {c["name"] for c in document["checks"]} >= {"run_files", "certificate", "tensors"}
    described = out / "onnx" / "weights-map.json"
    before = described.read_bytes()
    document = json.loads(before)
    first = next(iter(document["hashes"]))
    document["hashes"][first] = "0" * 64
    described.write_text(json.dumps(document))
    try:
        code, document, _ = run("verify", out)
    finally:
        described.write_bytes(before)
    assert code == 3
    assert any(c["name"] == "tensors" and first in c["note"] for c in document["checks"] if not c["passed"])


def test_verify_one_pass_compares_manifest_with_certificate(
    streamed: tuple[Path, dict[str, Any]], run: Run, tmp_path: Path
) -> None:
    """Options changed afterwards, the digest made to fit; and a report that is gone."""
    out = tmp_path / "run"
    shutil.copytree(streamed[0], out)
    manifest = read_sealed(out / "manifest.json")
    manifest["options"]["merge"]["certify"] = "full"
    write_sealed(out / "manifest.json", manifest)
    shutil.rmtree(out / "report")
    code, document, _ = run("verify", out)
    assert code == 3
    notes = [c["note"] for c in document["checks"] if not c["passed"]]
    assert any("its merge options are not those of the certificate" in note for note in notes)
    assert any("report/report.json is missing" in note for note in notes)


def test_one_pass_without_adapter_fails_gate(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the ONNX gate can see it."""
    from lora_export.merging.running.audit import Auditor
    from lora_export.merging.running.exact import Errors
    from lora_export.merging.running.stream import MergedSource

    def without(self: Any, info: Any, start: int, into: memoryview) -> None:
        stored = self.plan.tensors[info.name].source
        stored.source.read_into(stored, start, into)

    monkeypatch.setattr(MergedSource, "read_into", without)
    monkeypatch.setattr(Auditor, "judge", lambda *_: Errors())
    base, adapter = Source("base", inputs[0]), AdapterChoice(inputs[1])
    options = StoryOptions(export=ExportOptions(provider="cpu"), merged_folder=False)
    with pytest.raises(GateFailed, match="onnx_logits_max_abs"):
        merge_and_export(base, [adapter], tmp_path / "run", options, Silent())
    assert (tmp_path / "run.failed" / CERTIFICATE).is_file()


def test_one_pass_second_adapter_reuses_graph(
    inputs: tuple[Path, Path], plain: Path, run: Run, tmp_path: Path
) -> None:
    second = save_adapter(inputs[0], tmp_path / "second", seed=5)
    words = ["-b", inputs[0], "-a", second, "-o", tmp_path / "run", "--graph-from", plain / "onnx", *WORDS]
    code, document, talk = run("merge-and-export", *words)
    assert code == 0 and document["validate"]["passed"], talk
    graph, data = "model.onnx", "model.onnx.data"
    assert sha256(tmp_path / "run" / "onnx" / graph) == sha256(plain / "onnx" / graph)
    assert sha256(tmp_path / "run" / "onnx" / data) != sha256(plain / "onnx" / data)
