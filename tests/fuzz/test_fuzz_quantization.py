"""Quantized bases: quantization_config, the state of bitsandbytes, and the parts of every format."""

import json
import math
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bitsandbytes import functional as bnb
from hypothesis import strategies as st
from safetensors.torch import load_file

from lora_export.checkpoint import Checkpoint, open_checkpoint
from lora_export.contracts import MergeOptions
from lora_export.errors import LoraExportError
from lora_export.merging import MergePlan, plan
from lora_export.quantization import QuantizedWeight, find_quantized
from lora_export.workflows.inspection import inspect_folder
from tests.fuzz.files import Entry, damaged_entries, entries, write
from tests.fuzz.guard import attempt, harness
from tests.fuzz.strategies import damaged_bytes, damaged_tree, encoded
from tests.quantization import floats, packing

STATE = "w.weight.quant_state.bitsandbytes__nf4"


def bnb4(double: bool) -> dict[str, torch.Tensor]:
    weight = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    return {f"w.weight.{k}": v for k, v in state.as_dict(packed=True).items()} | {"w.weight": codes}


def bnb8() -> dict[str, torch.Tensor]:
    codes, scb, _ = bnb.int8_vectorwise_quant(torch.randn(6, 8).half())
    return {"w.weight": codes, "w.SCB": scb, "w.weight_format": torch.zeros((), dtype=torch.uint8)}


def compressed(kind: str, **weights: Any) -> dict[str, Any]:
    group = {"format": kind, "weights": {"num_bits": 4, "type": "int", "symmetric": True} | weights}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": group}}


def sample(name: str) -> dict[str, torch.Tensor]:
    """Of tests/quantization/samples, under this file's names."""
    values = load_file(Path(packing.__file__).parent / "samples" / f"{name}.safetensors")
    return {k.replace("model.layers.0.mlp.down_proj", "w"): v for k, v in values.items() if k != "expected"}


def ternary() -> dict[str, torch.Tensor]:
    return {"w.weight": packing.integers(0, 256, 3, 10).to(torch.uint8), "w.weight_scale": torch.ones(1)}


MLX = {"model_type": "llama", "quantization": {"group_size": 64, "bits": 3, "w": {"group_size": 64, "bits": 3}}}


def floating(name: str, ends: str, parts: packing.Tensors, exact: torch.Tensor) -> packing.Tensors:
    """The same parts under a weight's name; one whose end has no underscore is the weight itself."""
    return {
        f"{name}{end if end.startswith('_') else ''}": v
        for end, v in zip(ends.split(), parts.values(), strict=True)
    }


TWO = floats.fp4(4, 64, group=32, kind=torch.int8)
CODES = packing.integers(-8, 8, 6, 32).to(torch.int8)
BASES: dict[str, tuple[tuple[Entry, ...], dict[str, Any]]] = {
    name: (entries(values | {"norm.weight": torch.ones(5)}), settings)
    for name, values, settings in (
        ("bnb4", bnb4(False), {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        ("bnb4 double", bnb4(True), {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}),
        ("bnb8", bnb8(), {"quant_method": "bitsandbytes", "load_in_8bit": True}),
        ("gptq", packing.gptq(8, 64, 4, 32)[0], {"quant_method": "gptq", "bits": 4, "group_size": 32}),
        (
            "awq",
            packing.awq(16, 64, 32)[0],
            {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
        ),
        ("fp8", packing.fp8(20, 40)[0], {"quant_method": "fp8", "weight_block_size": [16, 32]}),
        ("packed", packing.packed(8, 64, 4, 32, False, True)[0], compressed("pack-quantized", group_size=32)),
        (
            "fused fp8",
            floating("e.up", "codes _scale_inv", *floats.fp8((3, 4, 8), (3, 2, 2))),
            {"quant_method": "fp8"},
        ),
        ("two in a byte", floating("w.weight", "packed _scale", *TWO), {"quant_method": "fp8"}),
        ("mxfp4", floating("e.up", "_blocks _scales", *floats.blocks(2, 4, 32)), {"quant_method": "mxfp4"}),
        ("modelopt", floating("w.weight", "packed _scale", *floats.fp4(4, 32)), {"quant_method": "modelopt"}),
        (
            "nvfp4",
            floating("w.weight", "_packed _scale", *floats.fp4(4, 32)) | {"w.weight_global_scale": torch.ones(1)},
            compressed("nvfp4-pack-quantized"),
        ),
        (
            "plain",
            packing.plain(6, 32, CODES, (3, 2), (2, 16), True)[0],
            compressed("int-quantized", block_structure=[2, 16]),
        ),
        ("hqq", sample("hqq-3-axis0"), {"quant_method": "hqq"}),
        ("hqq floats", sample("hqq-4-floats"), {"quant_method": "hqq"}),
        ("quanto", sample("quanto-qint8"), {"quant_method": "quanto"}),
        ("bitnet", ternary(), {"quant_method": "bitnet", "linear_class": "autobitlinear"}),
        ("autoround", sample("autoround-gptq-3"), {"quant_method": "auto-round", "bits": 3, "group_size": 64}),
        ("mlx", sample("mlx-3-64"), MLX["quantization"]),
    )
}
KEYS = (
    "quant_method", "load_in_4bit", "load_in_8bit", "bits", "w_bit", "group_size", "q_group_size", "version",
    "zero_point", "checkpoint_format", "weight_block_size", "format", "config_groups", "sparsity_config", "weights",
    "block_structure", "linear_class", "quantization_mode", "packing_format", "extra_config", "dynamic", "mode",
    "quantization", "desc_act", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant",
)  # fmt: skip
WORDS = (
    "w", "weight", "qweight", "qzeros", "scales", "g_idx", "bias", "SCB", "weight_format", "absmax", "quant_map",
    "nested_absmax", "nested_quant_map", "quant_state", "bitsandbytes__nf4", "bitsandbytes__fp4", "weight_packed",
    "weight_shape", "weight_scale", "weight_zero_point", "weight_global_scale", "weight_scale_2", "_blocks",
    "_scales", "weight_g_idx", "weight_scale_inv", "norm",
    "W_q", "scale", "zero", "axis", "packing", "shape", "_data", "_scale", "_shift", "biases",
)  # fmt: skip


@st.composite
def bases(draw: st.DrawFn) -> tuple[str, list[Entry], Any]:
    """A base's tensors and quantization_config, either or both damaged; the state of bitsandbytes is JSON, too."""
    name = draw(st.sampled_from(sorted(BASES)))
    tensors, settings = BASES[name]
    found = list(tensors)
    what = draw(st.sampled_from(["settings", "tensors", "tensors", "state", "both"]))
    settings = {"quantization_config": settings, "dtype": "bfloat16"} | (MLX if name == "mlx" else {})
    if what in ("settings", "both"):
        settings = draw(damaged_tree(settings, KEYS))
    if what == "state" and name.startswith("bnb4"):
        at = next(i for i, e in enumerate(found) if e.name == STATE)
        valid = json.loads(found[at].data)
        data = draw(damaged_tree(valid, tuple(valid)).map(encoded) | damaged_bytes(found[at].data))
        found[at] = replace(found[at], data=data, shape=(len(data),))
    elif what != "settings":
        found = draw(damaged_entries(tensors, WORDS))
    return name, found, settings


def check_rows(checkpoint: Checkpoint, weights: dict[str, QuantizedWeight], size: int) -> None:
    """All rows at once and in parts: fp32, of the shape that was promised, not many times the file's size."""
    for weight in weights.values():
        assert all(isinstance(n, int) and n >= 0 for n in weight.shape)
        assert math.prod(weight.shape) <= 16 * size
        assert set(weight.parts) <= set(checkpoint.tensors)
        loaded = attempt(checkpoint.folder, partial(weight.load, checkpoint))
        if isinstance(loaded, LoraExportError):
            continue
        count = weight.shape[0]
        for start, stop in {(0, count), (count // 2, count), (0, min(1, count))}:
            rows = attempt(checkpoint.folder, partial(loaded.rows, start, stop))
            assert isinstance(rows, LoraExportError) or (rows.dtype, rows.shape) == (
                torch.float32,
                (stop - start, *weight.shape[1:]),
            )


@harness(150, base=bases())
def test_quantized_base(base: tuple[str, list[Entry], Any]) -> None:
    _, tensors, config = base
    with tempfile.TemporaryDirectory() as name, torch.compiler.set_stance("force_eager"):
        folder = Path(name)
        write(folder / "model.safetensors", tensors)
        (folder / "config.json").write_bytes(encoded(config))
        size = (folder / "model.safetensors").stat().st_size
        checkpoint = attempt(folder, lambda: open_checkpoint(folder))
        described = attempt(folder, lambda: inspect_folder(folder))
        planned = attempt(folder, lambda: plan(folder, [], MergeOptions()))
        if not isinstance(described, LoraExportError):
            json.dumps(described, ensure_ascii=False).encode()
        if isinstance(checkpoint, LoraExportError):
            assert isinstance(planned, LoraExportError)
            return
        weights = attempt(folder, lambda: find_quantized(checkpoint, checkpoint.config))
        if isinstance(weights, LoraExportError):
            assert isinstance(planned, LoraExportError)
            return
        check_rows(checkpoint, weights, size)
        if isinstance(planned, MergePlan):
            assert {p.output.name for p in planned.tensors.values()} >= set(weights)
            parts = {p for w in weights.values() for p in w.parts} - set(weights)
            assert not parts & set(planned.tensors)
            assert np.isfinite(planned.nbytes)
