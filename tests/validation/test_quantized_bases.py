"""The stored tensors of a merge into a quantized base, against the base's: what may be missing, what may not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_export.contracts import MergeOptions
from lora_export.merging import merge
from lora_export.validation.folder.companions import expected_folder
from lora_export.validation.folder.settings import settings_check
from lora_export.validation.folder.stored import Changed, differences
from tests.quantization.floats import blocks, fp8

FUSED, _ = fp8((3, 32, 64), (3, 2, 2))
MX, _ = blocks(3, 32, 64)
NORM = {"norm.weight": torch.ones(8, dtype=torch.bfloat16)}
BASES = {
    "fp8 of fused experts": (
        {
            "experts.up_proj": FUSED["codes"], "experts.up_proj_scale_inv": FUSED["scale"],
            "experts.up_proj_activation_scale": torch.ones(3), "attention.k_scale": torch.ones(()),
        },
        {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
    ),
    "mxfp4": (
        {"experts.up_proj_blocks": MX["blocks"], "experts.up_proj_scales": MX["scales"]},
        {"quantization_config": {"quant_method": "mxfp4"}},
    ),
    "hf_quant_config.json": ({"up.weight": FUSED["codes"][0], "up.weight_scale": torch.ones(())}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", BASES)
def test_validate_dequantizing_merge_omissions_pass(tmp_path: Path, case: str) -> None:
    values, settings = BASES[case]
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    save_file(values | NORM, base / "model.safetensors")
    config = {"model_type": "odd", "dtype": "bfloat16"}
    (base / "config.json").write_text(json.dumps(config | (settings or {})))
    if settings is None:
        (base / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    merge(base, [], out)
    nothing, options = Changed([], [], {}), MergeOptions()
    assert list(differences(base, out, nothing, options, False)) == []
    expected = expected_folder(base, [], out, options, tmp_path / "expected")
    assert settings_check(expected, out).passed
    kept = load_file(out / "model.safetensors")
    weight = next(n for n in kept if "up" in n)
    for change in ({weight: None}, {"norm.weight": None}, {"norm.weight": NORM["norm.weight"] + 1}):
        spoiled = {n: v for n, v in (kept | change).items() if v is not None}
        save_file(spoiled, out / "model.safetensors")
        assert list(differences(base, out, nothing, options, False)), change
