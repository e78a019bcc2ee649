"""int8 activations for an export that is entirely fp32: dynamic or static quantization of its only graph."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_export.contracts import CalibrationRecord, QuantizationOptions
from lora_export.errors import ExportError
from lora_export.graph_runs.feeds import Feed, rows_of, token_feeds
from lora_export.graph_runs.signature import Signature
from lora_export.onnx_export.engines.protocol import Made
from lora_export.onnx_export.graphs.checks import open_model
from lora_export.onnx_export.quantize import calibration
from lora_export.onnx_export.quantize.settings import AUTO, GPTQ, are_statistics, unquantized
from lora_export.onnx_export.weights import map as weights_map

LONGEST = 128  # tokens of each calibration text


def check(precision: str, generates: bool, how: QuantizationOptions) -> None:
    """ExportError if only weights can be quantized, or if a calibration makes no sense; InputError for one that
    cannot be read. generates: whether the model generates text."""
    if how.activations == "float":
        _check_calibration(how)
        return
    if how.calibration is not None and how.activations != "static":
        raise ExportError(
            "dynamic activations take no calibration", expected="static", next_step="--activations static"
        )
    if precision != "int8":
        raise ExportError(
            f"int8 activations need int8 weights, not {precision}",
            expected="--precision int8",
            next_step="--precision int8",
        )
    if generates:
        raise ExportError(
            "int8 activations are not supported for a model that generates text",
            expected="a model that does not generate text",
            next_step="--precision int8 without --activations, or int4, which quantize only weights",
        )
    if how.calibration is not None:
        calibration.read(how.calibration)


def _check_calibration(how: QuantizationOptions) -> None:
    if how.calibration is None:
        return
    if how.algorithm != GPTQ and AUTO not in how.keep:
        raise ExportError(
            "a calibration needs a quantizer that reads texts, or static activations",
            expected="--quantizer gptq, --keep auto, or --activations static",
            next_step="--quantizer gptq",
        )
    if are_statistics(how.calibration):
        from lora_export.onnx_export.quantize.statistics import Statistics

        Statistics.open(how.calibration)
    else:
        calibration.read(how.calibration)


def quantize(
    folder: Path, model: Path, made: Made, how: QuantizationOptions, config: Mapping[str, Any]
) -> CalibrationRecord | None:
    """Replace the fp32 graph in `folder` by one with int8 products; returns what fixed their ranges, if texts did.

    The weights map is removed: no recipe describes what the quantizer makes of weights.
    """
    from lora_export.onnx_export.quantize.int8 import quantize_int8

    (name,) = made.graphs
    made_in = folder / ".int8"
    made_in.mkdir()
    feeds, record = None, None
    if how.activations == "static":
        feeds, record = _calibration(folder / name, model, how, config)
    described = weights_map.read(folder)
    quantize_int8(folder / name, made_in / name, feeds, unquantized(how), described.weights)
    for file in described.sizes:
        (folder / file).unlink()
    (folder / weights_map.NAME).unlink()
    for path in made_in.iterdir():
        path.replace(folder / path.name)
    shutil.rmtree(made_in)
    return record


def reproducible(record: CalibrationRecord | None) -> bool:
    """Whether an export needs no text of somebody's to be calibrated like the one of this record."""
    return record is None or record.text_sha256 == calibration.read(None).sha256


def _calibration(
    graph: Path, model: Path, how: QuantizationOptions, config: Mapping[str, Any]
) -> tuple[Sequence[Feed], CalibrationRecord]:
    longest = min(LONGEST, int(config.get("max_position_embeddings", LONGEST)))
    text = calibration.read(how.calibration)
    rows = rows_of(model, text.lines, longest)
    record = CalibrationRecord(text.sha256, sum(map(len, rows)), len(rows))
    return token_feeds(Signature.of_model(open_model(graph), graph), rows), record
