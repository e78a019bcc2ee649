"""Graphs under the names that Optimum and transformers.js look for: model, encoder_model, decoder_model_merged."""

from pathlib import Path

from lora_export.contracts import ExportResult
from lora_export.packages import graphs, speech, two_steps

_TWO_STEPS = ("encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx")


def lay(
    export: ExportResult, folder: Path, suffix: str = "", largest: int = graphs.LARGEST_CHUNK
) -> dict[str, int]:
    """Write the graphs of an export into `folder`: file name → number of its data files (NAME_data, NAME_data_1, …).

    suffix: of the names before .onnx; largest: bytes of a data file.
    """

    def save(name: str, model: "graphs.Model", sources: dict[str, Path]) -> tuple[str, int]:
        file = f"{name}{suffix}.onnx"
        return file, graphs.save(model, folder / file, f"{file}_data", sources, largest)

    source = export.output
    if speech.is_whisper(export):
        first, second = export.paths
        return dict(
            (
                save("encoder_model", *_alone(speech.encoder(first), source)),
                save("decoder_model_merged", *speech.decoder(first, second)),
            )
        )
    if export.graphs == _TWO_STEPS:
        encoder, decoder, later = export.paths
        return dict(
            (
                save("encoder_model", *_alone(graphs.load(encoder), source)),
                save("decoder_model_merged", *two_steps.joined(decoder, later)),
            )
        )
    return dict(save(p.stem, *_alone(graphs.load(p), source)) for p in export.paths)


def _alone(model: "graphs.Model", folder: Path) -> "tuple[graphs.Model, dict[str, Path]]":
    return model, {t.name: folder for t in graphs.external(model)}
