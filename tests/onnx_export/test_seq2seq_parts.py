"""What is traced of an encoder-decoder: inputs and caches as the model itself has them."""

from typing import Any

import pytest
import transformers

from lora_export.errors import ExportError
from lora_export.onnx_export.engines.parts import seq2seq

_BOTH = {
    "vocab_size": 99, "d_model": 48, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80, "encoder_layers": 3,
    "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 4, "max_position_embeddings": 64,
    "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
_WHISPER = {**_BOTH, "num_mel_bins": 8, "max_source_positions": 32, "max_target_positions": 64}


def _t5() -> Any:
    config = transformers.T5Config(
        vocab_size=99, d_model=48, d_kv=20, num_layers=2, num_decoder_layers=3, num_heads=4, d_ff=80
    )
    return transformers.T5ForConditionalGeneration(config)


def _bart() -> Any:
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**_BOTH))


def _whisper() -> Any:
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**_WHISPER))


def _trocr() -> Any:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
    encoder = transformers.ViTConfig(hidden_size=64, image_size=32, patch_size=8, **sizes)
    decoder = transformers.BertConfig(
        vocab_size=99, hidden_size=48, is_decoder=True, add_cross_attention=True, **sizes
    )
    both = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    return transformers.VisionEncoderDecoderModel(config=both)


def _names(layers: int) -> list[str]:
    kinds = [f"{of}.{what}" for of in ("decoder", "encoder") for what in ("key", "value")]
    return [f"past_key_values.{i}.{kind}" for i in range(layers) for kind in kinds]


@pytest.mark.parametrize(
    ("make", "layers", "heads", "size"),
    [(_t5, 3, 4, 20), (_bart, 1, 4, 12), (_whisper, 1, 4, 12), (_trocr, 2, 4, 12)],
)
def test_parts_caches_are_those_of_the_decoder(make: Any, layers: int, heads: int, size: int) -> None:
    encoder, first, later = seq2seq.parts(make().eval())
    caches = {name: given for name, given in later.inputs.items() if name.startswith("past")}
    assert list(caches) == _names(layers)
    assert {(shape[1], shape[3]) for shape, _, _ in caches.values()} == {(heads, size)}
    assert list(first.outputs) == ["logits", *(n.replace("past_key_values", "present") for n in _names(layers))]
    assert not [name for name in later.outputs if ".encoder." in name]
    assert [p.file for p in (encoder, first, later)] == [
        "encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "name", "shape", "dynamic"),
    [
        (_t5, "input_ids", (2, 11), [0, 1]),
        (_whisper, "input_features", (2, 8, 64), [0]),
        (_trocr, "pixel_values", (2, 3, 32, 32), [0]),
    ],
)
def test_parts_encoder_reads_what_its_signature_says(make: Any, name: str, shape: Any, dynamic: list[int]) -> None:
    model = make().eval()
    encoder, first, _ = seq2seq.parts(model)
    given, _, axes = encoder.inputs[name]
    assert (given, sorted(axes)) == (shape, dynamic)
    assert ("encoder_attention_mask" in first.inputs) == (name != "pixel_values")
    tasks = {"input_ids": "text2text-generation", "pixel_values": "image-to-text"}
    assert seq2seq.task(model, "what else") == tasks.get(name, "what else")


def test_parts_encoder_that_takes_no_input_is_refused() -> None:
    model = _whisper().eval()
    model.config.num_mel_bins = 5  # the convolution has 8
    with pytest.raises(ExportError, match="does not run on input_features"):
        seq2seq.parts(model)
