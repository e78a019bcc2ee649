"""Sounds through a folder's own feature extractor, as each family wants them."""

from pathlib import Path

import pytest
import transformers

from lora_export.validation.kinds.signals import _process_sounds


@pytest.mark.parametrize(
    ("extractor", "shapes"),
    [
        (transformers.WhisperFeatureExtractor(feature_size=80), [(1, 80, 3000), (2, 80, 3000)]),
        (transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True), [(1, 9600), (2, 20800)]),
    ],
    ids=lambda x: type(x).__name__,
)
def test_sounds_have_length_of_model(
    extractor: transformers.FeatureExtractionMixin, shapes: list[tuple[int, ...]], tmp_path: Path
) -> None:
    extractor.save_pretrained(tmp_path)
    batches = _process_sounds(tmp_path)
    values = [batch.get("input_features", batch.get("input_values")) for batch in batches]
    assert [tuple(v.shape) for v in values] == shapes
