"""Texts that an export was calibrated on: they may not judge it, because its numbers were chosen to suit them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_export.contracts import ExportOptions, ExportResult, ValidationOptions
from lora_export.errors import InputError
from lora_export.storage.sealed import sha256


def calibrations(exports: Sequence[ExportResult]) -> dict[str, Path]:
    """SHA-256 of each text that an export was calibrated on, as its record has it → the folder of the export."""
    return {e.calibration.text_sha256: e.output for e in exports if e.calibration is not None}


def asked_calibrations(export: ExportOptions) -> dict[str, Path]:
    """The same of an export that does not exist yet: of the text that it will read, or of the export whose graph it
    takes. InputError for a file that cannot be read."""
    from lora_export.onnx_export import load_export

    how = export.quantization
    if export.graph_from is not None:
        return calibrations([load_export(export.graph_from)])
    if how.calibration is None and how.activations != "static" and how.algorithm != "gptq":
        return {}
    read, path = _text_of(how.calibration)
    return {read: path}


def refuse_other_calibration(export: ExportOptions) -> None:
    """InputError for a calibration that is not the one of the export whose graph, and so whose statistics, are
    taken."""
    from lora_export.onnx_export import load_export

    given = export.quantization.calibration
    if export.graph_from is None or given is None:
        return
    earlier = load_export(export.graph_from)
    if earlier.calibration is None or earlier.calibration.text_sha256 != _text_of(given)[0]:
        known = earlier.calibration
        raise InputError(
            f"{given} is not what the export was calibrated on, whose statistics --graph-from takes",
            where=earlier.output,
            expected="no --calibration" + (f", or the text {known.text_sha256[:16]}" if known else ""),
            next_step="the same command without --calibration; or without --graph-from, which calibrates anew",
        )


def _text_of(given: Path | None) -> tuple[str, Path]:
    """SHA-256 of a calibration's text, or of the one that a file of statistics was made of; and the file."""
    from lora_export.onnx_export.quantize import calibration
    from lora_export.onnx_export.quantize.settings import are_statistics
    from lora_export.onnx_export.quantize.statistics import Statistics

    if given is not None and are_statistics(given):
        return Statistics.open(given).calibration.text_sha256, given
    text = calibration.read(given)
    return text.sha256, text.path


def refuse_calibrated(
    calibrated: Mapping[str, Path], options: ValidationOptions, own_texts: Sequence[Path] = ()
) -> None:
    """InputError for a text of a validation whose bytes an export was calibrated on.

    calibrated: hash → what names it in the message; without options.text, the built-in page is the text.
    """
    from lora_export.validation.comparing.texts import RUNNING_TEXT

    if not calibrated:
        return
    judges = [("--text", options.text or RUNNING_TEXT), ("--prompts", options.prompts)]
    for flag, file in (*judges, *(("--own-text", file) for file in own_texts)):
        found = calibrated.get(_hashed(file)) if file is not None else None
        if found is not None:
            built_in = file == RUNNING_TEXT
            what = "the built-in text of validation" if built_in else f"{flag} {file}"
            raise InputError(
                f"{what} is the text that the export was calibrated on",
                where=found,
                expected="a text that the export has not seen: on its own one it looks better than it is",
                next_step=f"the same command with {'a text of your own: ' if built_in else 'another '}{flag} FILE",
            )


def _hashed(file: Path) -> str:
    try:
        return sha256(file)
    except OSError as error:
        raise InputError(f"cannot read the text: {error.strerror}", where=file) from None
