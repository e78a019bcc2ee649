"""Encoder-decoders."""

from tests.export_matrix.models import Row

ROWS = (
    Row("WhisperForConditionalGeneration"),
    Row("MoonshineForConditionalGeneration"),
    Row("T5ForConditionalGeneration"),
    Row("MT5ForConditionalGeneration"),
    Row("MBartForConditionalGeneration"),
    Row("PegasusForConditionalGeneration"),
    Row("MarianMTModel"),
    Row("M2M100ForConditionalGeneration"),
    Row("LEDForConditionalGeneration"),
    Row("UMT5ForConditionalGeneration"),
)
