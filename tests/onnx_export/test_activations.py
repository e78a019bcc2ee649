"""int8 activations by the command line, and options of quantization that would do nothing."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from lora_export.commands.main import cli
from lora_export.contracts import ExportResult
from lora_export.graph_runs.feeds import rows_of
from tests.onnx_export.architectures import DYNAMO, save
from tests.onnx_export.runs import session


def run(model: Path, output: Path, *words: str) -> Result:
    return CliRunner().invoke(cli, ["export", "-m", str(model), "-o", str(output), *words, "--json"])


def operators(folder: Path) -> list[str]:
    return [n.op_type for n in onnx.load(folder / "model.onnx", load_external_data=False).graph.node]


def hidden(folder: Path) -> np.ndarray:
    ids = np.arange(4, 24)[None]
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    return np.asarray(session(folder / "model.onnx").run(None, given)[0])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "operator"), [("dynamic", "MatMulInteger"), ("static", "QuantizeLinear")])
def test_activations_int8_encoder_agrees(
    kind: str, operator: str, bert: Path, exported: Callable[..., ExportResult], tmp_path: Path
) -> None:
    words = ["--precision", "int8", "--activations", kind]
    if kind == "static":
        texts = tmp_path / "texts.txt"
        texts.write_text("abc def\n\nghi jkl mno\n" * 4)
        words += ["--calibration", str(texts)]
    found = run(bert, tmp_path / "onnx", *words)
    assert found.exit_code == 0, found.stderr
    document = json.loads(found.stdout)
    assert document["precision"] == "int8" and "weights-map.json" not in document["files"]
    recorded = json.loads((tmp_path / "onnx/export.json").read_text()).get("calibration")
    assert document["calibration"] == recorded
    if kind == "static":
        assert recorded == {
            "text_sha256": hashlib.sha256(texts.read_bytes()).hexdigest(),
            "tokens": sum(len(rows_of(bert, [t], 64)[0]) for t in ("abc def", "ghi jkl mno")) * 4,
            "windows": 8,
        }
    else:
        assert recorded is None
    assert operator in operators(tmp_path / "onnx")
    expected, quantized = hidden(exported(bert).output), hidden(tmp_path / "onnx")
    assert 0 < np.linalg.norm(expected - quantized) / np.linalg.norm(expected) < 0.15
    again = run(bert, tmp_path / "again", "--graph-from", str(tmp_path / "onnx"))
    assert again.exit_code == 1 and "without int8 activations" in again.stderr


@pytest.mark.slow
def test_activations_kept_node_stays_in_fp32(bert: Path, tmp_path: Path) -> None:
    words = ["--precision", "int8", "--activations", "dynamic", "--keep", "*"]
    found = run(bert, tmp_path / "onnx", *words)
    assert found.exit_code == 1 and "can be quantized to int8" in found.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--activations", "dynamic"], "int8 activations need int8 weights, not fp32"),
        (["--precision", "int4", "--activations", "static"], "int8 activations need int8 weights, not int4"),
        (
            ["--precision", "int8", "--calibration", "t.txt"],
            "a calibration needs a quantizer that reads texts, or static activations",
        ),
        (
            ["--precision", "int8", "--activations", "dynamic", "--calibration", "t.txt"],
            "dynamic activations take no calibration",
        ),
        (["--keep", "*"], "--keep with --precision fp32"),
        (["--precision", "fp16", "--block-size", "16"], "--block-size with --precision fp16"),
        (["--quantizer", "rtn"], "--quantizer with --precision fp32"),
        (["--precision", "int4", "--block-size", "48"], "blocks of 48"),
    ],
)
def test_activations_options_without_effect_are_refused(
    words: list[str], said: str, bert: Path, tmp_path: Path
) -> None:
    for more in ([], ["--dry-run"]):
        found = run(bert, tmp_path / "onnx", *words, *more)
        assert found.exit_code == 1 and said in found.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_activations_of_generating_model_are_refused(name: str, llama: Path, tmp_path: Path) -> None:
    model = llama if name == "llama" else save(DYNAMO["T5ForConditionalGeneration"], tmp_path / "t5")
    found = run(model, tmp_path / "onnx", "--precision", "int8", "--activations", "dynamic")
    assert found.exit_code == 1 and "a model that does not generate text" in found.stderr
    assert not (tmp_path / "onnx").exists()


def test_activations_keep_pattern_without_match_is_refused(llama: Path, tmp_path: Path) -> None:
    found = run(llama, tmp_path / "onnx", "--precision", "int4", "--keep", "*downproj*")
    assert found.exit_code == 1
    assert "--keep '*downproj*' matches no node" in found.stderr and "/model/layers.0/" in found.stderr
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe"])
def test_activations_calibration_without_text_is_refused(content: bytes, bert: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_bytes(content)
    words = ["--precision", "int8", "--activations", "static", "--calibration", str(tmp_path / "texts.txt")]
    found = run(bert, tmp_path / "onnx", *words)
    assert found.exit_code == 1 and "texts.txt" in found.stderr
    assert not (tmp_path / "onnx").exists()


def test_activations_calibration_of_a_run_is_not_its_text(llama: Path, adapter: Path, tmp_path: Path) -> None:
    for name in ("calibration", "text"):
        (tmp_path / name).write_text("one text for both\n")
    words = ["--precision", "int8", "--activations", "static", "--calibration", str(tmp_path / "calibration")]
    inputs = ["-b", str(llama), "-a", str(adapter), "-o", str(tmp_path / "out")]
    found = CliRunner().invoke(cli, ["merge-and-export", *inputs, *words, "--text", str(tmp_path / "text")])
    assert found.exit_code == 1 and "is the text that the export was calibrated on" in found.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calibration", "text"]
