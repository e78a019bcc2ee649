"""GGUF bases: tiny ones are written as llama.cpp's converter does, and read as transformers reads them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from lora_export.checkpoint import open_checkpoint
from lora_export.checkpoint.gguf import read_gguf
from lora_export.checkpoint.sources import resolve
from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.errors import CheckpointError, InputError
from lora_export.merging import merge
from lora_export.quantization import find_quantized
from lora_export.quantization.gguf import ARCHITECTURES
from tests.builders import (
    edit_json,
    llama_config,
    load,
    logits,
    lora,
    save_adapter,
    save_base,
    tensors,
    unmerged,
)
from tests.daily import daily

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BLOCKS = 2


def in_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a Llama's queries as llama.cpp has them: of each head the halves, in turn."""
    rows = []
    for head in weight.chunk(heads):
        first, second = head.chunk(2)
        for a, b in zip(first, second, strict=True):
            rows += [a, b]
    return torch.stack(rows)


def save_gguf(
    path: Path, architecture: int, values: dict[str, torch.Tensor], kind: Callable[[str], str], **settings: int
) -> dict[str, torch.Tensor]:
    """Write a file; what its blocks hold, by the names of the original.

    kind: the ggml type of a matrix by its name; vectors stay in fp32.
    """
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    names = gguf.get_tensor_name_map(architecture, BLOCKS)
    prefix = gguf.MODEL_ARCH_NAMES[architecture]
    for key, value in settings.items():
        writer.add_uint32(f"{prefix}.{key.replace('__', '.')}", value)
    writer.add_float32(f"{prefix}.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bé", ""])  # lists are passed over
    stored = {}
    for name, value in values.items():
        is_norm, moved = name.endswith("norm.weight"), value.float()
        if prefix == "llama" and "q_proj" in name:
            moved = in_pairs(moved, SIZES["num_attention_heads"])
        if prefix == "llama" and "k_proj" in name:
            moved = in_pairs(moved, SIZES["num_key_value_heads"])
        moved = moved + 1 if prefix.startswith(("gemma", "nemotron")) and is_norm else moved
        quantized = gguf.GGMLQuantizationType[kind(name) if value.dim() > 1 else "F32"]
        blocks = gguf.quantize(moved.numpy(), quantized)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), blocks, raw_dtype=quantized)
        read = torch.from_numpy(gguf.dequantize(np.asarray(blocks), quantized).copy())
        stored[name] = read.reshape(moved.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def llama(folder: Path, kind: Callable[[str], str] = lambda _: "Q8_0") -> dict[str, torch.Tensor]:
    """A folder with a GGUF file and config.json; the original, in safetensors, lies in `original` beside it."""
    original = save_base(folder / "original", config=llama_config(**SIZES))
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_bytes((original / "config.json").read_bytes())
    values = tensors(original)
    settings = {
        "context_length": 64, "embedding_length": 64, "block_count": BLOCKS, "feed_forward_length": 96,
        "attention__head_count": 4, "attention__head_count_kv": 2, "rope__dimension_count": 16, "vocab_size": 101,
    }  # fmt: skip
    save_gguf(folder / "base" / "m.gguf", gguf.MODEL_ARCH.LLAMA, values, kind, **settings)
    return values


@pytest.mark.parametrize("kind", daily(["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q4_0"], ["F32", "Q4_0"]))
def test_gguf_matches_transformers_reader(tmp_path: Path, kind: str) -> None:
    values = llama(tmp_path, lambda _: kind)
    checkpoint = open_checkpoint(tmp_path / "base")
    found = find_quantized(checkpoint, checkpoint.config)
    dequantize = transformers.GgufConfig(dequantize=True)
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "base", gguf_file="m.gguf", dtype=torch.float32, quantization_config=dequantize
    ).state_dict()
    assert found.keys() == theirs.keys() == values.keys()
    for name, weight in found.items():
        rows = weight.load(checkpoint)
        whole = rows.rows(0, weight.shape[0])
        assert torch.equal(whole, theirs[name]), name
        assert torch.equal(rows.rows(3, 9), whole[3:9])
        if kind == "F32":
            assert torch.equal(whole, values[name].float()), name
    assert {p for w in found.values() for p in w.parts} == set(checkpoint.tensors)


@pytest.mark.parametrize(
    ("architecture", "model_type"),
    daily(
        [(a, m) for a, types in ARCHITECTURES.items() for m in types if a != "llama"],
        [("gemma2", "gemma2"), ("qwen3", "qwen3")],
    ),
)
def test_gguf_converter_changes_are_undone(tmp_path: Path, architecture: str, model_type: str) -> None:
    """Norms lose the 1 that was added to Gemma's and Nemotron's; every tensor has its name."""
    config = transformers.AutoConfig.for_model(
        model_type, vocab_size=101, num_hidden_layers=BLOCKS, head_dim=16, pad_token_id=0, **SIZES
    )
    model_class = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    original = save_base(tmp_path / "original", model_class, config)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_bytes((original / "config.json").read_bytes())
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    save_gguf(tmp_path / "base" / "m.gguf", number, tensors(original), lambda _: "F32")
    checkpoint = open_checkpoint(tmp_path / "base")
    found = find_quantized(checkpoint, checkpoint.config)
    assert found.keys() == tensors(original).keys()
    for name, value in tensors(original).items():
        read = found[name].load(checkpoint).rows(0, len(value))
        torch.testing.assert_close(read, value.float(), rtol=0, atol=2.0**-23)  # + 1 − 1


def test_gguf_merge_equals_unmerged(tmp_path: Path) -> None:
    llama(tmp_path, lambda name: "Q4_1" if "down_proj" in name else "Q8_0")
    plain = merge(tmp_path / "base", [], tmp_path / "plain", MergeOptions(dtype="float32")).output
    adapter = save_adapter(tmp_path / "adapter", plain, lora())
    source = resolve(tmp_path / "base" / "m.gguf")
    assert source.folder == tmp_path / "base"
    result = merge(source.folder, [AdapterChoice(adapter)], tmp_path / "out", MergeOptions(dtype="float32"))
    assert result.tensors["copied"] == 0 and result.tensors["updated"] == 6
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"model.safetensors", "config.json"}
    assert not list((tmp_path / "out").glob("*.gguf"))
    expected = logits(unmerged(plain, adapter))
    assert float((logits(load(tmp_path / "out")) - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-64])


def _another_magic(path: Path) -> None:
    path.write_bytes(b"GGJT" + path.read_bytes()[4:])


def _many_settings(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[16:24] = (2**62).to_bytes(8, "little")
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_cut, "ends beyond the file"),
        (_another_magic, "first bytes are not GGUF"),
        (_many_settings, "not a sound GGUF"),
    ],
)
def test_gguf_damaged_file_is_refused(tmp_path: Path, damage: Callable[[Path], None], told: str) -> None:
    llama(tmp_path)
    damage(tmp_path / "base" / "m.gguf")
    with pytest.raises(CheckpointError, match=told):
        read_gguf(tmp_path / "base" / "m.gguf")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "architecture 'llama' with 'gpt2'"),
        ({"intermediate_size": 128}, r"of shape \[96, 64\]"),
        ({"num_hidden_layers": 1}, "config.json describes has no weight"),
        ({"num_hidden_layers": 3}, "is missing"),
    ],
)
def test_gguf_config_of_other_model_is_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    llama(tmp_path)
    edit_json(tmp_path / "base" / "config.json", **changes)
    checkpoint = open_checkpoint(tmp_path / "base")
    with pytest.raises(CheckpointError, match=told):
        find_quantized(checkpoint, checkpoint.config)


def test_gguf_ambiguous_files_are_refused(tmp_path: Path) -> None:
    llama(tmp_path)
    (tmp_path / "base" / "n.gguf").write_bytes(b"")
    with pytest.raises(InputError, match="2 GGUF files in one folder"):
        resolve(tmp_path / "base" / "m.gguf")
    (tmp_path / "base" / "n.gguf").unlink()
    (tmp_path / "base" / "config.json").unlink()
    with pytest.raises(InputError, match=r"without a config\.json") as caught:
        open_checkpoint(tmp_path / "base")
    assert "gguf_file=NAME" in str(caught.value.next_step)
