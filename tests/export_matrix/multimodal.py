"""Models that see and write."""

from tests.export_matrix.models import Row
from tests.export_matrix.seq2seq import WRITES
from tests.export_matrix.seq2seq_runs import agreement

ROWS = (
    Row("Qwen2_5_VLForConditionalGeneration"),
    Row("Gemma3ForConditionalGeneration"),
    Row("LlavaForConditionalGeneration"),
    Row("VisionEncoderDecoderModel", WRITES, agreement),
    Row("Qwen3_5ForConditionalGeneration"),
)
