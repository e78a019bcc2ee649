"""A merge that is not written, against the one that is: each tensor's bytes, hash, record, and what lies beside."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from lora_export.checkpoint import open_checkpoint
from lora_export.checkpoint.hashing import hash_tensor
from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.errors import LoraExportError
from lora_export.merging import merge, plan
from lora_export.merging.running.stream import MergedSource, write_outline
from tests.builders import gpt2_config, llama_config, lora, save_adapter, save_base, tensors

LLAMA = transformers.LlamaForCausalLM


def plain(folder: Path) -> tuple[Path, Path]:
    base = save_base(folder / "base", dtype=torch.bfloat16)
    return base, save_adapter(folder / "adapter", base, lora())


def tied_shards(folder: Path) -> tuple[Path, Path]:
    base = save_base(folder / "base", config=llama_config(tied=True), max_shard_size="40KB")
    return base, save_adapter(folder / "adapter", base, lora(target_modules=["embed_tokens", "v_proj"]))


def dora(folder: Path) -> tuple[Path, Path]:
    base = save_base(folder / "base", dtype=torch.float16)
    return base, save_adapter(folder / "adapter", base, lora(use_dora=True))


def conv1d(folder: Path) -> tuple[Path, Path]:
    base = save_base(folder / "base", transformers.GPT2LMHeadModel, gpt2_config())
    config = lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    return base, save_adapter(folder / "adapter", base, config, transformers.GPT2LMHeadModel)


def saved_modules(folder: Path) -> tuple[Path, Path]:
    base = save_base(folder / "base")
    return base, save_adapter(folder / "adapter", base, lora(modules_to_save=["lm_head"]))


def whole(folder: Path) -> tuple[Path, Path]:
    """LoHa's product of two matrices; PiSSA would need the whole weight, and OFT its own rows."""
    base = save_base(folder / "base")
    config: Any = peft.OFTConfig(oft_block_size=8, target_modules=["q_proj", "down_proj"], init_weights=False)
    return base, save_adapter(folder / "adapter", base, config)


MAKERS: list[Callable[[Path], tuple[Path, Path]]] = [plain, tied_shards, dora, conv1d, saved_modules, whole]


@pytest.mark.parametrize("make", MAKERS, ids=lambda m: m.__name__)
def test_streamed_merge_equals_merged_folder(make: Callable[[Path], tuple[Path, Path]], tmp_path: Path) -> None:
    base, adapter = make(tmp_path)
    choices, options = [AdapterChoice(adapter)], MergeOptions()
    result = merge(base, choices, tmp_path / "merged", options)
    written = open_checkpoint(tmp_path / "merged").tensors
    source = MergedSource(plan(base, choices, options), tmp_path / "outline")
    assert source.tensors.keys() == written.keys()
    expected = tensors(tmp_path / "merged")
    for name, info in written.items():
        assert source.known_hash(name) == hash_tensor(info), name
        height = info.shape[0] if info.shape else 1
        cut = height // 3
        rows = torch.cat([source.read_rows(name, 0, cut), source.read_rows(name, cut, height)])
        want = expected[name].contiguous().reshape(height, -1).view(torch.uint8)
        assert torch.equal(rows.reshape(height, -1).view(torch.uint8), want)
    for record, wanted in zip(source.audit.records, result.records, strict=True):
        pair = asdict(record), asdict(wanted)
        for field in ("relative_delta", "survival", "max_ulps", "mean_ulps"):  # sums over other blocks
            a, b = pair[0].pop(field), pair[1].pop(field)
            assert a == b or a == pytest.approx(b, rel=1e-6)
        assert pair[0] == pair[1]
    assert source.audit.survival == pytest.approx(result.delta_survival)
    assert not source.audit.unchecked


def test_streamed_outline_is_folder_without_weights(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", config=llama_config(hidden_size=144, num_attention_heads=4))
    adapter = save_adapter(tmp_path / "adapter", base, lora())
    choices, options = [AdapterChoice(adapter)], MergeOptions()
    merge(base, choices, tmp_path / "merged", options)
    source = MergedSource(plan(base, choices, options), tmp_path / "outline")
    write_outline(source)
    expected, found = tensors(tmp_path / "merged"), tensors(tmp_path / "outline")
    assert expected.keys() == found.keys()
    small = {n for n, t in expected.items() if t.numel() <= 2**14}
    assert small and small != expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]) if name in small else not tensor.any()
    for path in (tmp_path / "outline").iterdir():
        if path.suffix != ".safetensors":
            assert path.read_bytes() == (tmp_path / "merged" / path.name).read_bytes()


def test_streamed_nan_in_base_is_named(tmp_path: Path) -> None:
    base, adapter = plain(tmp_path)
    from tests.builders import edit_tensors

    name = "model.layers.0.self_attn.q_proj.weight"
    value = tensors(base)[name]
    value[0, 0] = float("nan")
    edit_tensors(base / "model.safetensors", {name: value})
    source = MergedSource(plan(base, [AdapterChoice(adapter)], MergeOptions()), tmp_path / "outline")
    with pytest.raises(LoraExportError, match="NaN"):
        source.read_rows(name, 0, 4)
