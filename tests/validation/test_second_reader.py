"""A compressed-tensors base is read again by its own library: a reader of ours that is wrong is noticed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams

from lora_export.contracts import MergeOptions
from lora_export.errors import CheckpointError
from lora_export.merging import merge
from lora_export.progress import Silent
from lora_export.quantization import compressed, scaled
from lora_export.validation.reference import second_reader
from lora_export.workflows.trained_base import stand_in
from tests.builders import edit_json, edit_tensors, save_base, tensors

GROUPS = {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 16}
CHANNEL = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}


def quantized_base(folder: Path, form: str, settings: dict[str, Any], ending: str = "_proj.weight") -> Path:
    """A Llama whose layers the library compressed; bf16 scales, as models have them."""
    base = save_base(folder, dtype=torch.bfloat16)
    args = QuantizationArgs(**settings)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    changes: dict[str, torch.Tensor | None] = {}
    for name, weight in tensors(base).items():
        if not name.endswith(ending):
            continue
        width = args.group_size or weight.shape[1]
        blocks = weight.float().reshape(len(weight), -1, width)
        scale, zero = calculate_qparams(blocks.amin(2), blocks.amax(2), args)
        parts = {"weight": weight.float(), "weight_scale": scale.bfloat16(), "weight_zero_point": zero}
        stored = BaseCompressor.get_value_from_registry(form).compress(parts, scheme)
        if args.symmetric:
            stored.pop("weight_zero_point", None)
        module = name.removesuffix(".weight")
        changes |= {name: None} | {f"{module}.{k}": v.contiguous() for k, v in stored.items()}
    edit_tensors(base / "model.safetensors", changes)
    group = {"weights": args.model_dump(mode="json"), "targets": ["Linear"]}
    told = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
    edit_json(base / "config.json", quantization_config=told | {"ignore": ["lm_head"]})
    return base


class Listening(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.mark.parametrize(
    ("form", "settings"), [("pack-quantized", GROUPS), ("float-quantized", CHANNEL)], ids=["packed", "fp8"]
)
def test_second_reader_agrees(tmp_path: Path, form: str, settings: dict[str, Any]) -> None:
    base = quantized_base(tmp_path / "base", form, settings)
    copy = merge(base, [], tmp_path / "copy", MergeOptions(dtype="float32")).output
    assert second_reader.compare(base, copy) == second_reader.ReadAgain(14, 0)
    progress = Listening()
    stand_in(base, copy, MergeOptions(), None, tmp_path, progress)
    assert progress.warnings == []  # nothing is taken on trust


@pytest.mark.parametrize(
    ("form", "settings", "owner"),
    [("pack-quantized", GROUPS, compressed.PackedRows), ("float-quantized", CHANNEL, scaled.ScaledRows)],
    ids=["packed", "fp8"],
)
def test_second_reader_difference_fails_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, settings: dict[str, Any], owner: Any
) -> None:
    base = quantized_base(tmp_path / "base", form, settings)
    rows = owner.rows

    def upside_down(self: Any, start: int, stop: int) -> torch.Tensor:
        return -rows(self, start, stop)

    monkeypatch.setattr(owner, "rows", upside_down)
    with pytest.raises(CheckpointError, match="reads other numbers from this weight of the base") as caught:
        stand_in(base, base, MergeOptions(), None, tmp_path, Silent())
    assert caught.value.tensor is not None and caught.value.tensor.endswith("_proj.weight")


def test_second_reader_unsupported_format_is_reported(tmp_path: Path) -> None:
    """Act-order: compressed-tensors wrote it once, and reads it no longer."""
    base = quantized_base(tmp_path / "base", "pack-quantized", GROUPS, "q_proj.weight")
    order = {"model.layers.0.self_attn.q_proj.weight_g_idx": torch.arange(48, dtype=torch.int32) // 16}
    edit_tensors(base / "model.safetensors", dict(order))
    progress = Listening()
    copy = stand_in(base, base, MergeOptions(), None, tmp_path, progress)
    assert copy is not None and second_reader.compare(base, copy) == second_reader.ReadAgain(1, 1)
    assert [w.split(" weights")[0] for w in progress.warnings] == ["1 of the compressed-tensors"]
