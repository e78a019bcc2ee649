"""Graphs under the names that Optimum and transformers.js look for: model, encoder_model, decoder_model_merged."""

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from lora_export.contracts import ExportResult
from lora_export.packages import graphs, speech, two_steps

_TWO_STEPS = ("encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx")


def lay(
    export: ExportResult,
    folder: Path,
    suffix: str = "",
    largest: int = graphs.LARGEST_CHUNK,
    adapt: Callable[[ir.Model], None] | None = None,
) -> dict[str, int]:
    """Write the graphs of an export into `folder`: file name → number of data files (NAME_data, NAME_data_1, …).

    suffix: of the names before .onnx; largest: bytes of a data file; adapt: changes each graph in place.
    """
    counts = {}
    for name, model in models(export).items():
        if adapt is not None:
            adapt(model)
        file = f"{name}{suffix}.onnx"
        counts[file] = graphs.save(model, folder / file, f"{file}_data", largest)
    return counts


def models(export: ExportResult) -> dict[str, ir.Model]:
    """Name → graph, whose external tensors know their files."""
    if speech.is_whisper(export):
        first, second = export.paths
        return {
            "encoder_model": speech.encoder(first),
            "decoder_model_merged": speech.decoder(first, second),
        }
    if export.graphs == _TWO_STEPS:
        encoder, decoder, later = export.paths
        return {
            "encoder_model": ir.load(encoder),
            "decoder_model_merged": two_steps.joined(decoder, later),
        }
    return {p.stem: ir.load(p) for p in export.paths}
