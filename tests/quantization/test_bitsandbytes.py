"""Quantized weights read bit for bit as bitsandbytes reads them, and merged as PEFT computes with them."""

import copy
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes import functional as bnb
from bitsandbytes import nn as bnb_nn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from lora_export.checkpoint import open_checkpoint
from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.errors import CheckpointError, InputError
from lora_export.merging import merge
from lora_export.quantization import TrainingQuantization, find_quantized, quantized_modules
from lora_export.quantization.bitsandbytes import Blocks4Bit, Rows8Bit
from tests.builders import (
    gpt2_config,
    llama_config,
    load,
    logits,
    lora,
    same_bytes,
    save_adapter,
    save_base,
    tensors,
    unmerged,
)

SHAPES = [(48, 80), (7, 9), (1, 65), (63, 1), (3, 5), (130, 67), (300, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def quantize(
    weight: torch.Tensor,
    kind: str = "nf4",
    double: bool = False,
    storage: torch.dtype = torch.uint8,
    blocksize: int = 64,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What bitsandbytes would save for `w.weight`, and the weight that it computes with, in fp32."""
    packed, state = bnb.quantize_4bit(
        weight, quant_type=kind, compress_statistics=double, quant_storage=storage, blocksize=blocksize
    )
    parts = {f"w.weight.{k}": v for k, v in state.as_dict(packed=True).items()} | {"w.weight": packed}
    state.dtype = torch.float32
    return parts, flat(packed, state)


def flat(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """bitsandbytes' dequantized weight, taken as one row: its AVX-512 kernel misplaces the blocks of a weight whose
    rows do not end with a block."""
    one_row = copy.copy(state)
    one_row.shape = torch.Size((1, math.prod(state.shape)))
    return bnb.dequantize_4bit(packed, one_row).reshape(state.shape)


def saved(folder: Path, parts: dict[str, torch.Tensor], bits: int = 4, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in parts.items()}, folder / "model.safetensors", {"format": "pt"})
    settings = {"quant_method": "bitsandbytes", f"load_in_{bits}bit": True}
    document = {"model_type": "llama", "quantization_config": settings} | config
    (folder / "config.json").write_text(json.dumps(document))
    return folder


def reader(folder: Path) -> Any:
    checkpoint = open_checkpoint(folder)
    found = find_quantized(checkpoint, checkpoint.config)
    assert list(found) == ["w.weight"]
    return found["w.weight"], found["w.weight"].load(checkpoint)


@pytest.fixture(autouse=True)
def without_compiling() -> Iterator[None]:
    """bitsandbytes compiles its CPU code for each shape, which takes seconds and changes no bit."""
    with torch.compiler.set_stance("force_eager"):
        yield


def same_values(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Every value is the same. FP4 has two codes for 0: bitsandbytes' kernel makes the second −0, its table 0."""
    return found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_bnb4_matches_bitsandbytes(
    tmp_path: Path, kind: str, double: bool, dtype: torch.dtype, storage: torch.dtype
) -> None:
    for i, shape in enumerate(SHAPES):
        elements = math.prod(shape)
        if storage != torch.uint8 and elements % 4:
            continue
        parts, expected = quantize(random(shape, dtype, i), kind, double, storage)
        weight, rows = reader(saved(tmp_path / str(i), parts))
        assert weight.shape == shape
        assert weight.dtype == {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
        assert set(weight.parts) == set(parts)
        assert same_values(rows.rows(0, shape[0]), expected), shape


@pytest.mark.parametrize("blocksize", [64, 128, 256])
def test_bnb4_other_block_sizes_match(tmp_path: Path, blocksize: int) -> None:
    parts, expected = quantize(random((130, 67)), double=True, blocksize=blocksize)
    _, rows = reader(saved(tmp_path, parts))
    assert same_bytes(rows.rows(0, 130), expected)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 40), width=st.integers(1, 90), double=st.booleans(), cuts=st.lists(st.integers(0, 40)),
    kind=st.sampled_from(["nf4", "fp4"]),
)  # fmt: skip
def test_bnb4_row_blocks_equal_whole(rows: int, width: int, double: bool, cuts: list[int], kind: str) -> None:
    packed, state = bnb.quantize_4bit(random((rows, width)), quant_type=kind, compress_statistics=double)
    whole = flat(packed, state)
    scale = state.absmax
    if double:
        scale = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    codes = packed.reshape(-1)
    blocks = Blocks4Bit(lambda a, b: codes[a:b], state.code, scale, state.blocksize, (rows, width))
    edges = sorted({0, rows, *(c for c in cuts if c <= rows)})
    pieces = [blocks.rows(a, b) for a, b in itertools.pairwise(edges)]
    assert same_values(torch.cat(pieces), whole)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 30), width=st.integers(1, 50), cuts=st.lists(st.integers(0, 30)))
def test_bnb8_row_blocks_equal_whole(rows: int, width: int, cuts: list[int]) -> None:
    codes, scb, _ = bnb.int8_vectorwise_quant(random((rows, width), torch.float16))
    blocks = Rows8Bit(codes, scb)
    edges = sorted({0, rows, *(c for c in cuts if c <= rows)})
    pieces = [blocks.rows(a, b) for a, b in itertools.pairwise(edges)]
    assert same_bytes(torch.cat(pieces), codes.float() * scb[:, None] / 127)


def test_bnb8_is_within_one_rounding_of_definition(tmp_path: Path) -> None:
    codes, scb, _ = bnb.int8_vectorwise_quant(random((48, 80), torch.float16))
    parts = {"w.weight": codes, "w.SCB": scb, "w.weight_format": torch.tensor(0, dtype=torch.uint8)}
    _, rows = reader(saved(tmp_path, parts, 8))
    exact = codes.double() * scb.double()[:, None] / 127
    found = rows.rows(0, 48).double()
    assert bool(((found - exact).abs() <= exact.abs() * 2.0**-22).all())


# --- on the fly, as training did ---------------------------------------------------------------------------

METHODS = [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True), ("int8", False)]


def bitsandbytes_config(method: str, double: bool, **more: Any) -> transformers.BitsAndBytesConfig:
    if method == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, **more)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=method, bnb_4bit_use_double_quant=double, **more
    )


def quantized_model(base: Path, method: str, double: bool, dtype: torch.dtype = torch.bfloat16, **more: Any) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=bitsandbytes_config(method, double, **more), dtype=dtype, device_map="cpu"
    )
    for module in model.modules():
        if isinstance(module, bnb_nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # else a forward repacks the weights in place
    return model


def dequantized(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Name → fp32 weight of every layer that bitsandbytes replaced."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb_nn.Linear4bit):
            state = module.weight.quant_state
            state.dtype = torch.float32
            value = flat(module.weight.data, state)
        elif isinstance(module, bnb_nn.Linear8bitLt):
            weight = module.weight
            value = weight.data.float() * weight.SCB[:, None].float() / 127
        else:
            continue
        found[f"{name}.weight"] = value.T.contiguous() if issubclass(module.source_cls, Conv1D) else value
    return found


@pytest.mark.parametrize(("method", "double"), METHODS)
def test_bnb4_round_trip_matches_transformers(tmp_path: Path, method: str, double: bool) -> None:
    for tied, dtype in ((False, torch.bfloat16), (True, torch.float16)):
        base = save_base(tmp_path / f"base-{tied}", config=llama_config(tied), dtype=dtype)
        expected = dequantized(quantized_model(base, method, double, dtype))
        assert len(expected) == 14
        names = {f"{n}.weight" for n in quantized_modules(base)}
        assert names == set(expected)
        how = TrainingQuantization(method, double)
        plain = tensors(base)
        for name, weight in expected.items():
            assert same_values(how.round_trip(plain[name]), weight), name


@pytest.mark.parametrize(("method", "double"), METHODS)
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(("gpt2", "dora"), [(False, False), (False, True), (True, False)])
def test_qlora_merge_equals_unmerged_dequantized_model(
    tmp_path: Path, method: str, double: bool, stored: bool, gpt2: bool, dora: bool
) -> None:
    """Stored in 4 or 8 bits, or quantized on the fly: both are dequant(quant(W)) + s·B·A. GPT-2 is transposed, and
    QDoRA's norm is that of the dequantized weight."""
    cls, config = (transformers.GPT2LMHeadModel, gpt2_config()) if gpt2 else (transformers.LlamaForCausalLM, None)
    plain = save_base(tmp_path / "plain", cls, config, dtype=torch.bfloat16)
    targets = ["c_attn", "c_proj", "c_fc"] if gpt2 else ALL_LINEAR
    adapter = save_adapter(tmp_path / "adapter", plain, lora(target_modules=targets, use_dora=dora), cls)
    model = quantized_model(plain, method, double)
    weights = dequantized(model)
    base, options = plain, {"training_quantization": method, "training_double_quant": double}
    if stored:
        model.save_pretrained(tmp_path / "quantized")
        base, options = tmp_path / "quantized", {}
    merged = tmp_path / "out"
    result = merge(base, [AdapterChoice(adapter)], merged, MergeOptions(dtype="float32", **options))
    oracle = unmerged(plain, adapter, cls)
    for name, weight in weights.items():
        oracle.get_base_model().get_submodule(name.removesuffix(".weight")).base_layer.weight.data = weight.clone()
    expected = logits(oracle)
    assert float((logits(load(merged, cls)) - expected).abs().max() / expected.abs().max()) < 1e-5
    shown = (logits(unmerged(plain, adapter, cls)) - expected).abs().max() / expected.abs().max()
    assert float(shown) > 1e-3  # what quantizing does
    assert result.base_weights == "dequantized"
    config = json.loads((merged / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    assert not [n for n in tensors(merged) if "quant" in n or "absmax" in n or "SCB" in n or "weight_format" in n]


def test_bnb4_stored_base_keeps_original_dtype(tmp_path: Path) -> None:
    plain = save_base(tmp_path / "plain", dtype=torch.bfloat16)
    quantized_model(plain, "nf4", True, bnb_4bit_quant_storage=torch.bfloat16).save_pretrained(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", plain, lora())
    result = merge(tmp_path / "base", [AdapterChoice(adapter)], tmp_path / "out")
    found = tensors(tmp_path / "out")
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    weights = dequantized(quantized_model(plain, "nf4", True))
    oracle = unmerged(plain, adapter).get_base_model()
    for name, weight in weights.items():
        module = oracle.get_submodule(name.removesuffix(".weight"))
        exact = weight.double()
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight.double(), module.lora_B["default"].weight.double()
            exact = exact + module.scaling["default"] * (b @ a)
        bound = exact.abs() * 2.0**-8 * (1 + 2.0**-10) + 2.0**-22
        assert bool(((found[name].double() - exact).abs() <= bound).all()), name
    assert result.tensors["dequantized"] == 14 - result.tensors["updated"]


def test_base_weights_original_merges_original(tmp_path: Path) -> None:
    plain = save_base(tmp_path / "plain")
    adapter = save_adapter(tmp_path / "adapter", plain, lora())
    options = MergeOptions(base_weights="original", training_quantization="nf4")
    result = merge(plain, [AdapterChoice(adapter)], tmp_path / "out", options)
    expected = logits(unmerged(plain, adapter))
    assert float((logits(load(tmp_path / "out")) - expected).abs().max() / expected.abs().max()) < 1e-5
    assert result.base_weights == "original"


# --- refusals ----------------------------------------------------------------------------------------------


def test_base_weights_original_of_stored_quantized_base_is_refused(tmp_path: Path) -> None:
    plain = save_base(tmp_path / "plain")
    adapter = save_adapter(tmp_path / "adapter", plain, lora())
    quantized_model(plain, "nf4", False).save_pretrained(tmp_path / "base")
    choices = [AdapterChoice(adapter)]
    with pytest.raises(InputError, match="original weights are not here"):
        merge(tmp_path / "base", choices, tmp_path / "out", MergeOptions(base_weights="original"))
    with pytest.raises(InputError, match="already stored quantized"):
        merge(tmp_path / "base", choices, tmp_path / "out", MergeOptions(training_quantization="nf4"))
    assert not (tmp_path / "out").exists()


def state_of(parts: dict[str, torch.Tensor], **changes: Any) -> dict[str, torch.Tensor]:
    name = next(n for n in parts if "quant_state" in n)
    state = json.loads(bytes(parts[name].tolist())) | changes
    text = json.dumps({k: v for k, v in state.items() if v != "drop"}).encode()
    return parts | {name: torch.frombuffer(bytearray(text), dtype=torch.uint8)}


STATES: list[tuple[dict[str, Any], str]] = [
    ({"blocksize": 0}, "blocks of 0"),
    ({"blocksize": "drop"}, "has no field 'blocksize'"),
    ({"blocksize": 128}, "absmax has"),
    ({"nested_blocksize": -1}, "nested -1"),
    ({"nested_offset": "drop"}, "nested_offset"),
    ({"nested_offset": math.nan}, "holds nan"),
    ({"shape": [48, 81]}, "elements of 4 bits"),
    ({"shape": []}, "the shape []"),
    ({"shape": [-48, -80]}, "the shape"),
    ({"shape": "x"}, "shape is a string"),
    ({"dtype": "int8"}, "the dtype 'int8'"),
    ({"dtype": ["float16"]}, "dtype is an array"),
    ({"quant_type": "fp4"}, "in a state named 'nf4'"),
]


@pytest.mark.parametrize(("changes", "said"), STATES)
def test_bnb4_damaged_state_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    parts, _ = quantize(random((48, 80)), double=True)
    with pytest.raises(CheckpointError) as caught:
        reader(saved(tmp_path, state_of(parts, **changes)))
    assert said in caught.value.found
    assert caught.value.tensor == "w.weight"
    assert caught.value.where == str(tmp_path / "model.safetensors")


@pytest.mark.parametrize("part", ["absmax", "quant_map", "nested_absmax", "nested_quant_map"])
def test_bnb4_missing_part_is_refused(tmp_path: Path, part: str) -> None:
    parts, _ = quantize(random((48, 80)), double=True)
    del parts[f"w.weight.{part}"]
    with pytest.raises(CheckpointError, match=f"w.weight.{part} is missing"):
        reader(saved(tmp_path, parts))


def test_bnb4_state_without_weight_is_refused(tmp_path: Path) -> None:
    parts, _ = quantize(random((48, 80)))
    name = next(n for n in parts if "quant_state" in n)
    with pytest.raises(CheckpointError, match="not JSON"):
        reader(saved(tmp_path / "a", parts | {name: torch.full((9,), 200, dtype=torch.uint8)}))
    del parts["w.weight"]
    with pytest.raises(CheckpointError, match="without its weight"):
        reader(saved(tmp_path / "b", parts))


def test_bnb8_damaged_parts_are_refused(tmp_path: Path) -> None:
    codes = torch.zeros(4, 6, dtype=torch.int8)
    good = {"w.weight": codes, "w.SCB": torch.ones(4)}
    cases = [
        ({"w.SCB": torch.ones(6)}, "[6] scales for a weight of shape [4, 6]"),
        ({"w.weight": codes.float()}, "without an int8 matrix"),
        ({"w.weight_format": torch.tensor(2, dtype=torch.uint8)}, "weight_format is 2"),
    ]
    for i, (changes, said) in enumerate(cases):
        with pytest.raises(CheckpointError) as caught:
            reader(saved(tmp_path / str(i), good | changes, 8))
        assert said in caught.value.found


@pytest.mark.parametrize("method", ["hqq", "quanto", "mxfp4", None])
def test_unsupported_quantization_is_refused_by_name(tmp_path: Path, method: str | None) -> None:
    parts, _ = quantize(random((48, 80)))
    folder = saved(tmp_path, parts, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(CheckpointError, match=str(method)):
        reader(folder)


def test_quantization_config_without_quantized_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no quantized weight is here"):
        reader(saved(tmp_path, {"w.weight": random((4, 4))}))
