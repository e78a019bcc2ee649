"""Small layers that other libraries quantized, with what they make of them, for tests/quantization/samples.

Needs hqq, optimum-quanto, torchao, mlx (with mlx-cpu) and auto-round beside this project's own environment; none of
them is needed to run the tests. Run: python tools/quantized_samples.py tests/quantization/samples
"""

import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

MODULE = "model.layers.0.mlp.down_proj"
SHAPE = (16, 256)
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 256,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2, "vocab_size": 64,
    "dtype": "float32", "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip
Made = tuple[
    dict[str, torch.Tensor], torch.Tensor, dict[str, Any], dict[str, str]
]  # parts, weight, config, metadata


def weight(columns: int = SHAPE[1], rows: int = SHAPE[0]) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(5)) * 0.05


def hqq(bits: float, size: int, axis: int, as_float: bool = False) -> Made:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    layer = torch.nn.Linear(SHAPE[1], SHAPE[0], bias=False)
    layer.weight.data = weight()
    config = BaseQuantizeConfig(nbits=bits, group_size=size, axis=axis, view_as_float=as_float)
    made = HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu")
    parts = {k: v for k, v in made.state_dict().items() if v is not None}
    settings = {"quant_config": {k: config[k] for k in ("weight_quant_params",)}, "quant_method": "hqq"}
    return parts, made.dequantize(), {"quantization_config": settings}, {}


def quanto(kind: str, columns: int = SHAPE[1]) -> Made:
    from optimum.quanto import QLinear, qtypes

    layer = torch.nn.Linear(columns, SHAPE[0], bias=False)
    layer.weight.data = weight(columns)
    made = QLinear.from_module(layer, weights=qtypes[kind])
    made.freeze()
    return dict(made.state_dict()), made.weight.dequantize(), {"intermediate_size": columns}, {}


def torchao(name: str, **settings: Any) -> Made:
    import torchao.quantization as ao
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import granularity

    if "group" in settings:
        settings["granularity"] = granularity.PerGroup(settings.pop("group"))
    if settings.pop("asymmetric", False):
        settings["mapping_type"] = ao.MappingType.ASYMMETRIC
    model = torch.nn.Sequential()
    model.add_module("w", torch.nn.Linear(SHAPE[1], SHAPE[0], bias=False))
    model.w.weight.data = weight()
    ao.quantize_(model, getattr(ao, f"{name}Config")(**settings))
    expected = model.w.weight.dequantize()
    parts, metadata = flatten_tensor_state_dict({f"{MODULE}.weight": model.state_dict()["w.weight"]})
    bare = {k.removeprefix(f"{MODULE}."): v for k, v in parts.items()}
    return bare, expected, {"quantization_config": {"quant_method": "torchao"}}, metadata


def mlx(mode: str, bits: int, size: int) -> Made:
    import mlx.core as mx
    import numpy as np

    parts = mx.quantize(mx.array(weight().numpy()), group_size=size, bits=bits, mode=mode)
    expected = mx.dequantize(*parts, group_size=size, bits=bits, mode=mode, dtype=mx.float32)
    names = ("weight", "scales", "biases")
    stored = {n: torch.from_numpy(np.array(p)) for n, p in zip(names, parts, strict=False)}
    settings = {"group_size": size, "bits": bits} | ({"mode": mode} if mode != "affine" else {})
    config = {"quantization": settings, "quantization_config": settings}
    return stored, torch.from_numpy(np.array(expected)), config, {"format": "mlx"}


def autoround(packing: str, bits: int, size: int, symmetric: bool) -> Made:
    """Packed by AutoRound's own layers, and read back by them."""
    from auto_round.export.export_to_autoround.export import dynamic_import_quant_linear_for_packing as packer
    from auto_round.export.export_to_awq.utils import WQLinear_GEMM, dequantize_gemm

    rows, columns = 32, 128  # its zeros fill whole words of 32 outputs
    values = weight(columns, rows).reshape(rows, -1, size)
    half, largest = 2 ** (bits - 1), 2**bits - 1
    if symmetric:
        scale = (values.abs().amax(-1) / half).half().float()
        zero = torch.full_like(scale, half)
    else:
        scale = ((values.amax(-1) - values.amin(-1)) / largest).half().float()
        zero = (-values.amin(-1) / scale).round().clamp(0, largest)
    layer = torch.nn.Linear(columns, rows, bias=False)
    codes = (values / scale[..., None] + zero[..., None]).round().clamp(0, largest)
    layer.weight.data = ((codes - zero[..., None]) * scale[..., None]).reshape(rows, columns)
    config = {"hidden_size": rows, "intermediate_size": columns}
    settings = {
        "quant_method": "auto-round", "packing_format": packing, "bits": bits, "group_size": size, "sym": symmetric,
    }  # fmt: skip
    if packing.endswith("awq"):
        made = WQLinear_GEMM.from_linear(layer, bits, size, scales=scale.T.contiguous(), zeros=zero.T.contiguous())
        read = dequantize_gemm(made.qweight, made.qzeros, made.scales.float(), bits, size).T.contiguous()
        return _parts(made), read, config | {"quantization_config": settings | {"zero_point": not symmetric}}, {}
    made = packer(packing, bits, size, symmetric, 16)(bits, size, columns, rows, False)
    made.device = "cpu"
    made.pack(layer, scale, zero, None, device="cpu")
    made.scales = made.scales.float()
    identity = torch.eye(columns)
    read = made(identity).T.contiguous()
    made.scales = made.scales.half()
    return _parts(made), read, config | {"quantization_config": settings}, {}


def _parts(layer: Any) -> dict[str, torch.Tensor]:
    return {k: v for k, v in layer.state_dict().items() if k in ("qweight", "qzeros", "scales", "g_idx")}


MLX_AFFINE = ((2, 32), (3, 64), (4, 64), (5, 32), (6, 128), (8, 64))  # bits, group size
ASYMMETRIC = {"group": 32, "asymmetric": True}
CASES: dict[str, tuple[str, Callable[[], Made]]] = {
    "hqq-4-axis1": ("hqq", lambda: hqq(4, 64, 1)),
    "hqq-4-axis0": ("hqq", lambda: hqq(4, 64, 0)),
    "hqq-3-axis1": ("hqq", lambda: hqq(3, 64, 1)),
    "hqq-3-axis0": ("hqq", lambda: hqq(3, 64, 0)),
    "hqq-2-axis1": ("hqq", lambda: hqq(2, 16, 1)),
    "hqq-8-axis1": ("hqq", lambda: hqq(8, 128, 1)),
    "hqq-1-axis0": ("hqq", lambda: hqq(1, 64, 0)),
    "hqq-4-floats": ("hqq", lambda: hqq(4, 64, 1, as_float=True)),
    "quanto-qint8": ("optimum-quanto", lambda: quanto("qint8")),
    "quanto-qint4": ("optimum-quanto", lambda: quanto("qint4")),
    "quanto-qint4-ungrouped": ("optimum-quanto", lambda: quanto("qint4", 96)),
    "quanto-qint2": ("optimum-quanto", lambda: quanto("qint2", 160)),
    "quanto-qfloat8": ("optimum-quanto", lambda: quanto("qfloat8")),
    "torchao-int8": ("torchao", lambda: torchao("Int8WeightOnly")),
    "torchao-int8-dynamic": ("torchao", lambda: torchao("Int8DynamicActivationInt8Weight")),
    "torchao-int8-groups": ("torchao", lambda: torchao("Int8WeightOnly", group=64)),
    "torchao-float8": ("torchao", lambda: torchao("Float8WeightOnly")),
    "torchao-intx4": ("torchao", lambda: torchao("IntxWeightOnly", weight_dtype=torch.int4, **ASYMMETRIC)),
    **{f"mlx-{b}-{s}": ("mlx", lambda b=b, s=s: mlx("affine", b, s)) for b, s in MLX_AFFINE},
    "mlx-mxfp4": ("mlx", lambda: mlx("mxfp4", 4, 32)),
    "mlx-mxfp8": ("mlx", lambda: mlx("mxfp8", 8, 32)),
    "mlx-nvfp4": ("mlx", lambda: mlx("nvfp4", 4, 16)),
    "autoround-gptq-4": ("auto-round", lambda: autoround("auto_round:auto_gptq", 4, 64, False)),
    "autoround-gptq-3": ("auto-round", lambda: autoround("auto_round:auto_gptq", 3, 64, True)),
    "autoround-gptqmodel-2": ("auto-round", lambda: autoround("auto_round:gptqmodel", 2, 32, False)),
    "autoround-awq": ("auto-round", lambda: autoround("auto_round:auto_awq", 4, 64, True)),
}  # fmt: skip


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (library, make) in CASES.items():
        parts, expected, config, metadata = make()
        assert float((expected - weight(*expected.shape[::-1])).abs().max()) < 0.4, name
        tensors = {f"{MODULE}.{k}": v.detach().contiguous() for k, v in parts.items()}
        made_by = f"{library} {importlib.metadata.version(library)}"
        told = metadata | {"config": json.dumps(CONFIG | config), "made_by": made_by}
        tensors["expected"] = expected.detach().contiguous()
        save_file(tensors, folder / f"{name}.safetensors", told)
        print(f"{name:24} {made_by}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
