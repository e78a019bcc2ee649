"""The reference's embedding: what modules.json says, of real tokens alone, in the type of the states."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from lora_export.validation.comparing import sentence
from tests.onnx_export.sentences import embedding, padded, save_modules

MODES = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
WIDTH = 32


def model() -> transformers.BertModel:
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=WIDTH, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.BertModel(config).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_modules(tmp_path, WIDTH, MODES, ((40, "Tanh"), (24, "Identity")))
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_embedding_is_that_of_definition(folder: Path, dtype: torch.dtype) -> None:
    body = model()
    types = sentence.attach(body, folder)
    assert types["2_Dense.linear.weight"] == torch.float32 and "2_Dense.linear.weight" in body.state_dict()
    for name in types:
        body.get_parameter(name).data = body.get_parameter(name).data.to(dtype)
    rows = [torch.randint(4, 100, (n,)) for n in (5, 1, 9)]
    mask = torch.from_numpy(padded(rows, "right")["attention_mask"])
    states = torch.randn(3, 9, WIDTH) + 9 * (1 - mask[..., None])
    found = sentence.embedding(body, states.to(dtype), mask)
    wanted = torch.stack([embedding(folder, s[: len(r)]) for s, r in zip(states, rows, strict=True)])
    assert found is not None and found.dtype == dtype
    torch.testing.assert_close(found.float(), wanted, atol=1e-6 if dtype == torch.float32 else 5e-3, rtol=1e-4)


def test_embedding_uses_weights_of_graph(folder: Path) -> None:
    body, stored = model(), load_file(folder / "2_Dense" / "model.safetensors")
    sentence.attach(body, folder, {"2_Dense.linear.bias": stored["linear.bias"] + 1})
    torch.testing.assert_close(body.get_parameter("2_Dense.linear.bias").data, stored["linear.bias"] + 1)


def test_embedding_needs_all_modules(folder: Path) -> None:
    (folder / "3_Dense" / "model.safetensors").unlink()
    assert sentence.attach(model(), folder) == {}
    assert sentence.embedding(model(), torch.zeros(1, 2, WIDTH), None) is None
