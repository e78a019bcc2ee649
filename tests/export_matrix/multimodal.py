"""Models that see and write."""

from tests.export_matrix.models import Row

ROWS = (
    Row("Qwen2_5_VLForConditionalGeneration"),
    Row("Gemma3ForConditionalGeneration"),
    Row("LlavaForConditionalGeneration"),
    Row("VisionEncoderDecoderModel"),
    Row("Qwen3_5ForConditionalGeneration"),
)
