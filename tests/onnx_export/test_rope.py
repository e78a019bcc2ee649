"""Rotary embeddings whose frequencies follow the length: what is traced computes what transformers does."""

from typing import Any

import pytest
import torch
import transformers

from lora_export.onnx_export.engines.dynamo_passes import rope, tracing

SIZES = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64,
    "num_key_value_heads": 2, "pad_token_id": 3,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16,
    "long_factor": [3.0 + i for i in range(6)], "short_factor": [1.0] * 6,
}  # fmt: skip


def model(kind: str) -> Any:
    if kind == "dynamic":
        config: Any = transformers.LlamaConfig(**SIZES, max_position_embeddings=16, rope_parameters=DYNAMIC)
        return transformers.LlamaModel(config)
    config = transformers.Phi3Config(
        **SIZES, max_position_embeddings=64, original_max_position_embeddings=16, rope_parameters=dict(LONG)
    )
    return transformers.Phi3Model(config)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("last", [9, 15, 16, 40])
def test_traceable_embedding_at_any_length_is_transformers_own(kind: str, last: int) -> None:
    traced = model(kind)
    positions = torch.arange(last + 1)[None]
    states = torch.zeros((1, last + 1, 48))
    before = traced.rotary_emb.inv_freq.clone()
    with rope.traceable(traced):
        found = traced.rotary_emb(states, positions)
    expected = model(kind).rotary_emb(states, positions)
    assert torch.equal(traced.rotary_emb.inv_freq, before)  # nothing is kept for the next length
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_traceable_embedding_asks_for_no_value(kind: str) -> None:
    traced = model(kind)
    with tracing.without_values(traced), rope.traceable(traced):
        cos, _ = traced.rotary_emb(torch.zeros((2, 3, 48)), torch.zeros((2, 3), dtype=torch.int64))
    assert cos.shape == (2, 3, 12)


def test_traceable_embedding_changes_with_the_length() -> None:
    """The test above would pass on frequencies that do not matter."""
    for kind in ("dynamic", "longrope"):
        traced = model(kind)
        with rope.traceable(traced):
            short, long = (traced.rotary_emb(torch.zeros((1, n, 48)), torch.arange(n)[None])[0] for n in (10, 41))
        assert (short - long[:, :10]).abs().max() > 1e-2
