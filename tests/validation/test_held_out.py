"""A text that an export was calibrated on does not judge it."""

import hashlib
import shutil
from pathlib import Path

import pytest

from lora_export.contracts import CalibrationRecord, ExportOptions, ExportResult, QuantizationOptions
from lora_export.contracts import ValidationOptions as Options
from lora_export.errors import InputError
from lora_export.onnx_export.quantize.calibration import BUILT_IN
from lora_export.validation.comparing.texts import RUNNING_TEXT
from lora_export.workflows.held_out import asked_calibrations, calibrations, refuse_calibrated


def _texts(folder: Path) -> tuple[Path, Path, Path]:
    """A text, a copy of it under another name, and one that differs by a byte."""
    text, copy, other = (folder / f"{name}.txt" for name in ("text", "copy", "other"))
    text.write_text("some words to be calibrated on\n")
    shutil.copyfile(text, copy)
    other.write_text("some words to be calibrated on.\n")
    return text, copy, other


def _export(text: Path | None, folder: Path) -> ExportResult:
    record = None if text is None else CalibrationRecord(hashlib.sha256(text.read_bytes()).hexdigest(), 7, 1)
    return ExportResult(folder, "dynamo", "int8", 1, 0.0, {}, calibration=record)


@pytest.mark.parametrize("flag", ["--text", "--prompts", "--own-text"])
def test_calibrated_text_as_judge_is_refused(flag: str, tmp_path: Path) -> None:
    text, copy, other = _texts(tmp_path)
    calibrated = calibrations([_export(None, tmp_path / "plain"), _export(text, tmp_path / "static")])

    def judged_on(file: Path) -> None:
        options = Options(**{"--text": {"text": file}, "--prompts": {"prompts": file}}.get(flag, {}))
        refuse_calibrated(calibrated, options, (other, file) if flag == "--own-text" else ())

    judged_on(other)
    with pytest.raises(InputError) as refused:
        judged_on(copy)
    assert f"{flag} {copy} is the text that the export was calibrated on" in refused.value.found
    assert refused.value.where == str(tmp_path / "static") and flag in str(refused.value.next_step)


def test_calibrated_text_may_not_be_the_built_in_one(tmp_path: Path) -> None:
    text, _, _ = _texts(tmp_path)
    refuse_calibrated({}, Options())
    refuse_calibrated(calibrations([_export(text, tmp_path)]), Options())
    with pytest.raises(InputError, match="the built-in text of validation is the text"):
        refuse_calibrated(calibrations([_export(RUNNING_TEXT, tmp_path)]), Options())


def test_calibrated_text_of_a_run_is_that_of_its_options(tmp_path: Path) -> None:
    text, copy, other = _texts(tmp_path)
    asked = asked_calibrations(ExportOptions("int8", quantization=QuantizationOptions(calibration=text)))
    refuse_calibrated(asked, Options(text=other))
    with pytest.raises(InputError, match=r"copy\.txt is the text"):
        refuse_calibrated(asked, Options(text=copy))
    assert asked_calibrations(ExportOptions("int8")) == {}
    for how in (QuantizationOptions(activations="static"), QuantizationOptions(algorithm="gptq")):
        refuse_calibrated(asked_calibrations(ExportOptions("int8", quantization=how)), Options())
        with pytest.raises(InputError, match=r"calibration\.txt is the text"):
            refuse_calibrated(asked_calibrations(ExportOptions("int8", quantization=how)), Options(text=BUILT_IN))
    with pytest.raises(InputError, match="cannot"):
        asked_calibrations(ExportOptions(quantization=QuantizationOptions(calibration=tmp_path / "missing")))
