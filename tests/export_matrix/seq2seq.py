"""Encoder-decoders."""

from typing import Any

from tests.export_matrix.models import Row
from tests.export_matrix.seq2seq_runs import agreement
from tests.onnx_export.architectures import _WHISPER
from tests.onnx_export.runs import worst

WRITES = {"decoder": {"is_decoder": True, "add_cross_attention": True}}  # of models joined from two


def _row(cls: str, variant: str = "", **settings: Any) -> Row:
    return Row(cls, settings, agreement, variant=variant)


# The runtime that the builder writes for hears thirty seconds.
BUILT = {**_WHISPER, "encoder_layers": 3, "decoder_layers": 1}

ROWS = (
    _row("WhisperForConditionalGeneration", encoder_layers=3),
    Row("WhisperForConditionalGeneration", BUILT, worst, variant="turbo"),
    _row("MoonshineForConditionalGeneration", encoder_num_key_value_heads=4, decoder_num_key_value_heads=4),
    _row("T5ForConditionalGeneration"),
    _row("T5ForConditionalGeneration", "deeper decoder", num_decoder_layers=3),
    _row("MT5ForConditionalGeneration"),
    _row("BartForConditionalGeneration", "distilled", encoder_layers=3, decoder_layers=1),
    _row("MBartForConditionalGeneration"),
    _row("PegasusForConditionalGeneration"),
    _row("MarianMTModel"),
    _row("MarianMTModel", "unequal heads", encoder_layers=3, encoder_attention_heads=2),
    _row("M2M100ForConditionalGeneration"),
    _row("LEDForConditionalGeneration"),
    _row("UMT5ForConditionalGeneration"),
    _row("Speech2TextForConditionalGeneration"),
    _row("SpeechEncoderDecoderModel", **WRITES),
    _row("SwitchTransformersForConditionalGeneration"),
)
