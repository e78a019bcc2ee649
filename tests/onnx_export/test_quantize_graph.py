"""Quantized graphs: the builder's own, ONNX Runtime's quantizer's, and what they compute."""

from pathlib import Path
from typing import Any

import onnx
import pytest

from lora_export.contracts import Precision, QuantizationOptions
from lora_export.onnx_export import export
from lora_export.progress import Silent
from tests.onnx_export.conftest import save_llama

Tensors = dict[str, tuple[int, tuple[int, ...], bytes]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[bool, str], Path]:
    """Llamas whose embeddings are tied or not, by the type that they are stored in."""
    root = tmp_path_factory.mktemp("llamas")
    return {
        (tied, dtype): save_llama(root / f"{tied}-{dtype}", seed=3, tied=tied, dtype=dtype)
        for tied, dtype in ((True, "bfloat16"), (False, "float32"))
    }


def _built(model: Path, folder: Path, precision: str, provider: str, options: QuantizationOptions) -> Path:
    """The graph of onnxruntime-genai's builder itself."""
    from onnxruntime_genai.models import builder

    how = {
        "hf_remote": "false",
        "hf_token": "false",
        "windowed_kv_cache": "false",
        "is_symmetric": str(options.symmetric and options.algorithm != "k_quant").lower(),
        "block_size": str(options.block_size or 32),
        "accuracy_level": str(4 if provider == "cpu" else 0),
        "algo_config": options.algorithm,
    }
    if provider == "cpu":
        how["fuse_qk_norm_gqa"] = "false"
    common = ("", str(model), str(folder), precision, provider, str(folder / "cache"))
    builder.create_model(*common, **builder.parse_extra_options(*common, [f"{k}={v}" for k, v in how.items()]))
    return folder / "model.onnx"


def _nodes(model: onnx.ModelProto) -> set[tuple[Any, ...]]:
    return {
        (
            node.op_type,
            node.domain,
            node.name,
            tuple(node.input),
            tuple(node.output),
            frozenset(a.SerializeToString(deterministic=True) for a in node.attribute),
        )
        for node in model.graph.node
    }


def _tensors(model: onnx.ModelProto) -> Tensors:
    return {
        t.name: (t.data_type, tuple(t.dims), onnx.numpy_helper.to_array(t).tobytes())
        for t in model.graph.initializer
    }


CASES: list[tuple[bool, Precision, str, QuantizationOptions]] = [
    (True, "int4", "cpu", QuantizationOptions()),
    (True, "int4", "cpu", QuantizationOptions(algorithm="k_quant")),
    (False, "int4", "cpu", QuantizationOptions(symmetric=False, block_size=16)),
    (False, "int4", "cuda", QuantizationOptions(algorithm="rtn", symmetric=False)),
    (False, "int8", "cuda", QuantizationOptions()),
]


@pytest.mark.parametrize(("tied", "precision", "provider", "options"), CASES)
def test_a_decoder_is_the_builders(
    models: dict[tuple[bool, str], Path],
    tmp_path: Path,
    tied: bool,
    precision: Precision,
    provider: str,
    options: QuantizationOptions,
) -> None:
    """fp32 weights in a graph for CUDA: they are rounded to fp16 before they are quantized."""
    model = models[tied, "bfloat16" if tied else "float32"]
    ours = export(
        model,
        tmp_path / "ours",
        precision=precision,
        provider=provider,
        quantization=options,
        progress=Silent(),
    )
    found = onnx.load(ours.model)
    expected = onnx.load(_built(model, tmp_path / "built", precision, provider, options))
    assert _nodes(found) == _nodes(expected)
    assert [(o.domain, o.version) for o in found.opset_import] == [
        (o.domain, o.version) for o in expected.opset_import
    ]
    assert _tensors(found) == _tensors(expected)
