"""Tokenizers of packages state how long a text may be, and never less than the model reads."""

import json
from typing import Any

import pytest
import torch
import transformers

from lora_export.packages.text_length import bounded, most_tokens

ENDLESS = transformers.tokenization_utils_base.VERY_LARGE_INTEGER
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}


@pytest.mark.parametrize(
    ("config", "sentence", "most"),
    [
        ({"model_type": "bert", "max_position_embeddings": 512}, {}, 512),
        ({"model_type": "bert", "max_position_embeddings": 512}, {"max_seq_length": 256}, 256),
        ({"model_type": "bert", "max_position_embeddings": 512}, {"max_seq_length": None}, 512),
        ({"model_type": "mpnet", "max_position_embeddings": 514, "pad_token_id": 1}, {"max_seq_length": 768}, 512),
        ({"model_type": "xlm-roberta", "max_position_embeddings": 514}, {}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 40, "pad_token_id": 3}, {}, 36),
        ({"model_type": "gpt2", "n_positions": 1024}, {}, 1024),
        ({"model_type": "t5", "n_positions": 512}, {}, None),
        ({"model_type": "t5", "n_positions": 512}, {"max_seq_length": 300}, 300),
        ({"model_type": "led", "max_encoder_position_embeddings": 16_384}, {}, 16_384),
        ({"model_type": "whisper", "max_target_positions": 448}, {}, 448),
        ({"model_type": "gemma3", "text_config": {"max_position_embeddings": 131_072}}, {}, 131_072),
        ({"model_type": "qwen2", "max_position_embeddings": 32_768, "rope_scaling": YARN}, {}, 131_072),
        ({"model_type": "qwen2", "max_position_embeddings": 131_072, "rope_parameters": YARN}, {}, 131_072),
        ({"model_type": "llama", "max_position_embeddings": 4096, "rope_scaling": {"factor": 4.0}}, {}, 16_384),
        ({"model_type": "llama", "max_position_embeddings": 4096, "rope_parameters": {}}, {}, 4096),
        ({"model_type": "mamba"}, {}, None),
    ],
)  # fmt: skip
def test_most_tokens_is_what_configurations_say(
    config: dict[str, Any], sentence: dict[str, Any], most: int | None
) -> None:
    assert most_tokens(config, sentence) == most


@pytest.mark.parametrize("endless", [ENDLESS, 1e30, 10**20, None, 0])
def test_tokenizer_without_limit_gets_that_of_model(endless: Any) -> None:
    config = {"tokenizer_class": "X", "model_max_length": endless}
    assert bounded(config, 512) == {"tokenizer_class": "X", "model_max_length": 512}
    assert bounded(config, None) == {"tokenizer_class": "X"}
    assert bounded({}, 512) == {"model_max_length": 512}


@pytest.mark.parametrize("stated", [77, 1_000_000])
def test_stated_limit_of_tokenizer_stays(stated: int) -> None:
    assert bounded({"model_max_length": stated}, 512) == {"model_max_length": stated}


@pytest.mark.parametrize(
    "kind", ["roberta", "camembert", "xlm-roberta", "mpnet", "data2vec-text", "ibert", "bert", "electra"]
)
def test_most_tokens_is_longest_text_that_model_computes(kind: str) -> None:
    """One token more is not in its table of positions."""
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=50, hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=20, pad_token_id=1, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    model = transformers.AutoModel.from_config(config).eval()
    most = most_tokens(json.loads(config.to_json_string()), {})
    assert most is not None
    model(torch.full((1, most), 7))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, most + 1), 7))
