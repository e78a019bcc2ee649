"""Exports with gptq: the graph of the default quantizer, other bytes, and the next adapter without another run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from lora_export.contracts import ExportOptions, ExportResult, QuantizationOptions
from lora_export.errors import InputError
from lora_export.graph_runs.feeds import rows_of
from lora_export.onnx_export import export, reweight
from lora_export.onnx_export.quantize import certificate
from lora_export.onnx_export.quantize.settings import STATISTICS
from lora_export.progress import Silent
from lora_export.workflows.exporting import check_export
from lora_export.workflows.proving import prover
from tests.onnx_export.conftest import feeds_of, save_llama

TEXT = "Fellow citizens of the Senate and of the House: another year of health has passed. " * 12
DEFAULT = ExportOptions("int4", "cpu", "genai")


def gptq(calibration: Path) -> ExportOptions:
    how = QuantizationOptions(algorithm="gptq", calibration=calibration)
    return replace(DEFAULT, quantization=how)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two of one shape."""
    folder = tmp_path_factory.mktemp("models")
    return save_llama(folder / "one", seed=1), save_llama(folder / "other", seed=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def exported(models: tuple[Path, Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """Proven."""
    output = tmp_path_factory.mktemp("exports") / "gptq"
    return export(models[0], output, gptq(text), prove=prover("quick"), progress=Silent())


def data_of(folder: Path) -> bytes:
    return (folder / "model.onnx.data").read_bytes()


def test_gptq_graph_is_that_of_default_quantizer(
    exported: ExportResult, models: tuple[Path, Path], tmp_path: Path
) -> None:
    default = export(models[0], tmp_path / "default", DEFAULT, progress=Silent())
    assert exported.model.read_bytes() == default.model.read_bytes()
    assert data_of(exported.output) != data_of(default.output)


def test_gptq_record_and_certificate_say_how_weights_were_made(exported: ExportResult) -> None:
    assert exported.calibration is not None and exported.calibration.tokens > 500
    weights = certificate.read(exported.output)
    assert {w.quantizer for w in weights} == {"gptq"} and all(w.calibrated for w in weights)
    assert all(0 < (w.output_error or 0) < 0.2 for w in weights)
    record = json.loads((exported.output / "export.json").read_text(encoding="utf-8"))
    assert record["quantization"]["algorithm"] == "gptq"


def test_gptq_next_adapter_is_fresh_export_with_same_statistics(
    exported: ExportResult, models: tuple[Path, Path], tmp_path: Path
) -> None:
    again = reweight(exported.output, models[1], tmp_path / "again", progress=Silent())
    statistics = gptq(exported.output / STATISTICS)
    fresh = export(models[1], tmp_path / "fresh", statistics, progress=Silent())
    for name in ("model.onnx", "model.onnx.data", STATISTICS, certificate.NAME, "weights-map.json"):
        assert (again.output / name).read_bytes() == (fresh.output / name).read_bytes(), name
    assert data_of(again.output) != data_of(exported.output)


@pytest.mark.slow
def test_gptq_statistics_of_another_text_change_bytes(
    exported: ExportResult, models: tuple[Path, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("".join(reversed(TEXT)), encoding="utf-8")
    again = export(models[0], tmp_path / "again", gptq(other), progress=Silent())
    assert data_of(again.output) != data_of(exported.output)
    assert again.calibration != exported.calibration


@pytest.mark.slow
def test_gptq_is_calibrated_on_the_model_that_is_named(
    exported: ExportResult, models: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    from lora_export.onnx_export.engines.building import numbers_of

    named = numbers_of(models[0], None)
    base = export(models[1], tmp_path / "base", gptq(text), calibrated_on=named, progress=Silent())
    assert (base.output / STATISTICS).read_bytes() == (exported.output / STATISTICS).read_bytes()


@pytest.mark.parametrize("change", ["text", "default export"])
def test_gptq_other_calibration_with_earlier_graph_is_refused(
    exported: ExportResult, text: Path, tmp_path: Path, change: str
) -> None:
    earlier, given = exported.output, text
    if change == "text":
        given = tmp_path / "changed.txt"
        given.write_text(TEXT + "And one more.", encoding="utf-8")
    else:
        earlier = tmp_path / "earlier"
        shutil.copytree(exported.output, earlier)
        record = json.loads((earlier / "export.json").read_text(encoding="utf-8"))
        (earlier / "export.json").write_text(json.dumps(record | {"calibration": None}), encoding="utf-8")
    with pytest.raises(InputError, match="is not what the export was calibrated on"):
        check_export(0, replace(gptq(given), graph_from=earlier))


@pytest.mark.parametrize("given", ["text", "statistics"])
def test_gptq_same_calibration_with_earlier_graph_is_accepted(
    exported: ExportResult, text: Path, given: str
) -> None:
    path = text if given == "text" else exported.output / STATISTICS
    check_export(0, replace(gptq(path), graph_from=exported.output))


def test_gptq_missing_statistics_are_refused(
    exported: ExportResult, models: tuple[Path, Path], tmp_path: Path
) -> None:
    earlier = tmp_path / "earlier"
    shutil.copytree(exported.output, earlier)
    (earlier / STATISTICS).unlink()
    with pytest.raises(InputError, match="statistics are missing"):
        reweight(earlier, models[1], tmp_path / "again", progress=Silent())
    assert not (tmp_path / "again").exists()


@pytest.mark.slow
def test_gptq_outputs_are_nearer_than_default(models: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    """Embeddings aside, of which a tied head and a lookup want different things."""
    plain = export(models[0], tmp_path / "plain", replace(DEFAULT, precision="fp32"), progress=Silent())
    products = replace(gptq(text).quantization, embeddings=False)
    exported = export(models[0], tmp_path / "gptq", replace(DEFAULT, quantization=products), progress=Silent())
    nearest = replace(products, algorithm="default", calibration=None)
    default = export(models[0], tmp_path / "default", replace(DEFAULT, quantization=nearest), progress=Silent())
    held_out = ("The year has passed in health, citizens.", "Another Senate has met; the House of all fellows.")
    rows = rows_of(models[0], held_out, 40)
    lost = []
    for other in (exported, default):
        answers = [
            [ort.InferenceSession(e.model, providers=["CPUExecutionProvider"]).run(["logits"], f)[0] for f in feeds]
            for e in (plain, other)
            for feeds in [feeds_of(e.model, rows)]
        ]
        lost.append(sum(float(np.sum((a - b) ** 2)) for a, b in zip(*answers, strict=True)))
    assert lost[0] < 0.8 * lost[1]
