"""Encoder-decoders."""

from typing import Any

from tests.export_matrix.models import Row
from tests.export_matrix.seq2seq_runs import agreement


def _row(cls: str, variant: str = "", **settings: Any) -> Row:
    return Row(cls, settings, agreement, variant=variant)


ROWS = (
    _row("MoonshineForConditionalGeneration"),
    _row("T5ForConditionalGeneration"),
    _row("MT5ForConditionalGeneration"),
    _row("MBartForConditionalGeneration"),
    _row("PegasusForConditionalGeneration"),
    _row("MarianMTModel"),
    _row("M2M100ForConditionalGeneration"),
    _row("LEDForConditionalGeneration"),
    _row("UMT5ForConditionalGeneration"),
)
