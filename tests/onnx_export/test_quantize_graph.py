"""Quantized graphs: the builder's own, ONNX Runtime's quantizer's, and what they compute."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from lora_export.choices import Precision
from lora_export.contracts import ExportOptions, QuantizationOptions
from lora_export.errors import ExportError
from lora_export.onnx_export import export
from lora_export.onnx_export.quantize.numbers import dequantize, quantize
from lora_export.onnx_export.quantize.settings import Blockwise, blockwise, chosen, escaped
from lora_export.onnx_export.weights.map import Piece, Recipe, Weight
from lora_export.progress import Silent
from tests.daily import daily, later
from tests.onnx_export.conftest import quantized_graph, save_llama

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
        "is_symmetric": str(options.symmetric).lower(),
        "block_size": str(options.block_size or 32),
        "accuracy_level": str(4 if provider == "cpu" else 0),
        "algo_config": options.algorithm,
    }
    if options.eight_bits:
        how["matmul_mixed_precision"] = "last_matmul:int8,mixed_layers:int8"
    if provider == "cpu":
        how["fuse_qk_norm_gqa"] = "false"
    common = ("", str(model), str(folder), precision, provider, str(folder / "cache"))
    builder.create_model(*common, **builder.parse_extra_options(*common, [f"{k}={v}" for k, v in how.items()]))
    return folder / "model.onnx"


def _nodes(model: onnx.ModelProto) -> set[tuple[Any, ...]]:
    """The nodes with quantized weights, and what they read of those; around them ours takes padding on the left."""
    return {
        (
            node.op_type,
            node.domain,
            node.name,
            tuple(node.input[1:]),
            tuple(node.output),
            frozenset(a.SerializeToString(deterministic=True) for a in node.attribute),
        )
        for node in model.graph.node
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized")
    }


def _tensors(model: onnx.ModelProto) -> Tensors:
    return {
        t.name: (t.data_type, tuple(t.dims), onnx.numpy_helper.to_array(t).tobytes())
        for t in model.graph.initializer
    }


# What the builder's own choice of layers for 8 bits comes to in a model of two.
MIXED = ("/lm_head/MatMul", "/model/layers.0/attn/qkv_proj/MatMul", "/model/layers.0/mlp/down_proj/MatMul")
TABLES = ("/model/embed_tokens/*",)  # the builder quantizes them only if they are tied, and to 4 bits
CASES: list[tuple[bool, Precision, str, QuantizationOptions]] = [
    (True, "int4", "cpu", QuantizationOptions(block_size=32, symmetric=True)),
    (False, "int4", "cpu", QuantizationOptions(symmetric=False, block_size=16, eight_bits=MIXED, keep=TABLES)),
    (False, "int4", "cuda", QuantizationOptions(32, False, "rtn", keep=TABLES)),
    (True, "int8", "cpu", QuantizationOptions(32, symmetric=True, keep=TABLES)),
]


@pytest.mark.parametrize(("tied", "precision", "provider", "options"), daily(CASES, [CASES[1]]))
def test_quantize_decoder_matches_builder(
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
        model, tmp_path / "ours", ExportOptions(precision, provider, quantization=options), progress=Silent()
    )
    found = onnx.load(ours.model)
    expected = onnx.load(_built(model, tmp_path / "built", precision, provider, options))
    assert _nodes(found) and _nodes(found) == _nodes(expected)
    assert [(o.domain, o.version) for o in found.opset_import] == [
        (o.domain, o.version) for o in expected.opset_import
    ]
    read = {name for node in _nodes(expected) for name in node[3]}
    assert {n: t for n, t in _tensors(found).items() if n in read} == {
        n: t for n, t in _tensors(expected).items() if n in read
    }


@pytest.mark.parametrize(
    ("precision", "how", "embedding"),
    [
        later(("int4", QuantizationOptions(eight_bits=("/lm_head/*",)), "GatherBlockQuantized")),
        later(("int4", QuantizationOptions(keep=("/lm_head/*",)), "Gather")),
        later(("int4", QuantizationOptions(eight_bits=("model.embed_tokens.weight",)), "GatherBlockQuantized")),
        later(("int4", QuantizationOptions(keep=("model.embed_tokens.weight",)), "Gather")),
        later(("int4", QuantizationOptions(16, False, "k_quant"), "GatherBlockQuantized")),
        ("int8", QuantizationOptions(), "GatherBlockQuantized"),
    ],
)
def test_quantize_tied_embedding_follows_head(
    models: dict[tuple[bool, str], Path],
    tmp_path: Path,
    precision: Precision,
    how: QuantizationOptions,
    embedding: str,
) -> None:
    """Graphs that the builder's names would make unloadable, and an int8 one, where the builder has two tensors."""
    model = models[True, "bfloat16"]
    made = export(model, tmp_path / "onnx", ExportOptions(precision, "cpu", quantization=how), progress=Silent())
    graph = onnx.load(made.model)
    assert embedding in {n.op_type for n in graph.graph.node}
    (lookup,) = (n for n in graph.graph.node if n.op_type == embedding and "embed_tokens" in n.name)
    (head,) = (n for n in graph.graph.node if n.name.startswith("/lm_head/MatMul"))
    made_by = {o: n for n in graph.graph.node for o in n.output}
    table = made_by[lookup.input[0]].input[0]
    assert (table, *lookup.input[2:]) == tuple(head.input[1:])
    assert sum("embed_tokens" in t.name for t in graph.graph.initializer) == 0


# --- a small graph -----------------------------------------------------------------------------------------

Array = np.ndarray[Any, Any]
VOCABULARY, WIDTH, WIDE = 72, 64, 112
random = np.random.default_rng(0)
# Checkpoint tensors as torch has them: (out, in); `conv` as GPT-2's: (in, out).
CHECKPOINT: dict[str, Array] = {
    name: random.normal(size=shape).astype(np.float32) * 0.2
    for name, shape in {
        "up": (WIDE, WIDTH), "gate": (WIDE, WIDTH), "down": (WIDTH, WIDE), "conv": (WIDTH, WIDTH),
        "embedding": (VOCABULARY, WIDTH),
    }.items()
}  # fmt: skip


def _recipe(*names: str, turned: bool = True) -> Recipe:
    return Recipe(tuple(Piece(n, 0, len(CHECKPOINT[n])) for n in names), transposed=turned)


WEIGHTS = (
    Weight("w_embedding", "data", "float32", (VOCABULARY, WIDTH), _recipe("embedding", turned=False)),
    Weight("w_up", "data", "float32", (WIDTH, 2 * WIDE), _recipe("up", "gate")),
    Weight("w_down", "data", "float32", (WIDE, WIDTH), _recipe("down")),
    Weight("w_conv", "data", "float32", (WIDTH, WIDTH), _recipe("conv", turned=False)),
)


def _graph(dtype: int = onnx.TensorProto.FLOAT) -> onnx.ModelProto:
    """Two layers with the same weights, a product of two activations, and a head that is the embedding."""
    make = onnx.helper.make_node
    nodes = [make("Gather", ["w_embedding", "ids"], ["x0"], name="lookup")]
    for i in range(2):
        nodes += [
            make("MatMul", [f"x{i}", "w_up"], [f"up{i}"], name=f"layers.{i}.up"),
            make("Slice", [f"up{i}", "zero", "middle", "last"], [f"half{i}"], name=f"slice{i}"),
            make("MatMul", [f"half{i}", "w_down"], [f"down{i}"], name=f"layers.{i}.down"),
            make("MatMul", [f"down{i}", "w_conv"], [f"conv{i}"], name=f"layers.{i}.conv"),
            make("Transpose", [f"conv{i}"], [f"turned{i}"], name=f"turn{i}", perm=[0, 2, 1]),
            make("MatMul", [f"conv{i}", f"turned{i}"], [f"scores{i}"], name=f"scores{i}"),
            make("MatMul", [f"scores{i}", f"x{i}"], [f"x{i + 1}"], name=f"mix{i}"),
        ]
    nodes.append(
        make("FusedMatMul", ["x2", "w_embedding"], ["logits"], name="head", domain="com.microsoft", transB=1)
    )
    tensors = [onnx.TensorProto(name=w.name, data_type=dtype, dims=w.shape) for w in WEIGHTS]
    tensors += [
        onnx.numpy_helper.from_array(np.array([n], np.int64), name)
        for name, n in (("zero", 0), ("middle", WIDE), ("last", -1))
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["batch", "length"])],
        [onnx.helper.make_tensor_value_info("logits", dtype, ["batch", "length", VOCABULARY])],
        tensors,
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _stored(weight: Weight) -> Array:
    """The matrix of a weight before it is quantized, by its recipe."""
    joined = np.concatenate([CHECKPOINT[p.tensor][p.start : p.stop] for p in weight.recipe.pieces])
    return np.ascontiguousarray(joined.T) if weight.recipe.transposed else joined


def _value(weight: Weight) -> Array:
    how = weight.recipe.quantized
    return _stored(weight) if how is None else quantize(_stored(weight), how)[how.part]


def _logits(model: onnx.ModelProto, values: dict[str, Array]) -> Array:
    for tensor in model.graph.initializer:
        if tensor.name in values:
            value = values[tensor.name]
            assert tuple(tensor.dims) == value.shape
            assert tensor.data_type == onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"ids": np.array([[1, 5, 2], [7, 0, 39]])})[0])


def _dequantized(weight: Weight) -> Array:
    how = weight.recipe.quantized
    assert how is not None
    matrix = _stored(weight)
    return dequantize(quantize(matrix, how), matrix.shape[0], matrix.shape[1], how)


@pytest.mark.parametrize(
    "how",
    [
        Blockwise("int4", accuracy_level=1, embeddings=False),
        Blockwise("int4", 16, symmetric=False),
        Blockwise("int4", 64, symmetric=False, accuracy_level=1),  # an odd number of blocks
        Blockwise("int4", 32, False, "k_quant", 1, ("*.down", "head")),
        Blockwise("int8", 64, keep=("lookup",)),
        Blockwise("int8", 128),  # rows end within a block
        Blockwise("int4", 32, accuracy_level=1, eight_bits=("*.down", "head")),
        Blockwise("nf4", 64, embeddings=False),
        Blockwise("nf4", 128),
    ],
)
def test_quantize_graph_computes_with_dequantized_weights(how: Blockwise) -> None:
    model, weights = quantized_graph(_graph(), WEIGHTS, how)
    found = _logits(model, {w.name: _value(w) for w in weights})

    plain = {w.name: _value(w) for w in WEIGHTS}
    for packed in (w for w in weights if w.recipe.quantized is not None and w.recipe.quantized.part == "packed"):
        name = packed.name.split("_Q")[0].removesuffix("_Bnb4")
        plain[name] = _dequantized(packed) if name != "w_embedding" else _dequantized(packed).T.copy()
    reference = _graph()
    if "w_embedding" in {w.name for w in weights}:  # the lookup, or the head, reads it as it is
        original = onnx.TensorProto(name="w_original", data_type=1, dims=(VOCABULARY, WIDTH))
        reference.graph.initializer.append(original)
        for node in reference.graph.node:
            if node.name in (("head", "lookup") if "head" in how.keep else ("lookup",)):
                at = list(node.input).index("w_embedding")
                node.input[at] = "w_original"
        plain["w_original"] = CHECKPOINT["embedding"]
    expected = _logits(reference, plain)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    exact = _logits(_graph(), {w.name: _value(w) for w in WEIGHTS})
    assert np.abs(found - exact).max() > 1e-4 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("how", "embedding"),
    [
        (Blockwise("int4"), ["w_embedding_Q4", "w_embedding_scales"]),
        (
            Blockwise("int4", 64, symmetric=False),
            ["w_embedding_Q4", "w_embedding_scales", "w_embedding_zero_points"],
        ),
        (Blockwise("int4", symmetric=False), ["w_embedding_Q4", "w_embedding_scales", "w_embedding_zero_points"]),
        (Blockwise("nf4", 64), ["w_embedding_Q8", "w_embedding_scales"]),
        (Blockwise("int4", keep=("lookup",)), ["w_embedding", "w_embedding_Q4", "w_embedding_scales"]),
    ],
)
def test_quantize_embedding_and_head_share_one_tensor(how: Blockwise, embedding: list[str]) -> None:
    """nf4 has no lookup, and CUDA's miscounts zero points of 4 bits where a row has an odd number of blocks."""
    _, weights = quantized_graph(_graph(), WEIGHTS, how)
    found = [w for w in weights if w.name.startswith("w_embedding")]
    assert [w.name for w in found] == embedding
    if "zero_points" in embedding[-1]:
        assert found[1].shape == (VOCABULARY, 2)


def test_quantize_lone_table_becomes_int8() -> None:
    _, weights = quantized_graph(_graph(), WEIGHTS, Blockwise("int4", keep=("head",)))
    assert "w_embedding_Q8" not in {w.name for w in weights}  # the head holds it unquantized anyway
    alone = _graph()
    alone.graph.node[-1].input[1] = "w_head"
    head = Weight("w_head", "data", "float32", (VOCABULARY, WIDTH), _recipe("embedding", turned=False))
    alone.graph.initializer.append(onnx.TensorProto(name="w_head", data_type=1, dims=head.shape))
    _, weights = quantized_graph(alone, [*WEIGHTS, head], Blockwise("int4"))
    assert {"w_embedding_Q8", "w_head_Q4"} <= {w.name for w in weights}


@pytest.mark.parametrize(("turned", "how"), [(False, Blockwise("int4")), (True, Blockwise("int8", 128))])
def test_quantize_gemm_keeps_its_bias(turned: bool, how: Blockwise) -> None:
    """GPT-2's layers: a weight (in, out), or (out, in) if turned."""
    make, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    weight = Weight("w", "data", "float32", (WIDTH, WIDE)[:: -1 if turned else 1], _recipe("up", turned=not turned))
    bias = onnx.numpy_helper.from_array(random.normal(size=WIDE).astype(np.float32), "bias")
    graph = onnx.helper.make_graph(
        [make("Gemm", ["x", "w", "bias"], ["y"], name="gemm", transB=int(turned))],
        "g",
        [info("x", 1, ["n", WIDTH])],
        [info("y", 1, ["n", WIDE])],
        [onnx.TensorProto(name="w", data_type=1, dims=weight.shape), bias],
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    plain = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    model, weights = quantized_graph(plain, [weight], how)
    assert [n.op_type for n in model.graph.node] == ["MatMulNBits", "Add"]
    values = {w.name: _value(w) for w in weights}
    for tensor in model.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(onnx.numpy_helper.from_array(values[tensor.name], tensor.name))
    x = random.normal(size=(3, WIDTH)).astype(np.float32)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x})
    expected = x @ _dequantized(weights[0]) + onnx.numpy_helper.to_array(bias)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(("between", "quantized"), [("TopK", False), ("MatMul", True)])
def test_quantize_router_stays_as_it_is(between: str, quantized: bool) -> None:
    """Scores of 112 experts, of which the graph takes two; what lies behind another product is none."""
    make, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    (weight,) = (w for w in WEIGHTS if w.name == "w_down")
    router = Weight("w", "data", "float32", (WIDTH, WIDE), _recipe("up"))
    nodes = [make("MatMul", ["x", "w"], ["scores"], name="router"), make("Softmax", ["scores"], ["shares"])]
    if between == "MatMul":
        nodes.append(make("MatMul", ["shares", "w_down"], ["mixed"], name="down"))
    nodes.append(make("TopK", ["mixed" if between == "MatMul" else "shares", "two"], ["best", "which"]))
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [info("x", 1, ["n", WIDTH])],
        [info("which", 7, ["n", 2])],
        [
            onnx.TensorProto(name="w", data_type=1, dims=router.shape),
            onnx.TensorProto(name="w_down", data_type=1, dims=weight.shape),
            onnx.numpy_helper.from_array(np.array([2], np.int64), "two"),
        ],
    )
    plain = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    if quantized:
        model, _ = quantized_graph(plain, [router, weight], Blockwise("int4"))
        assert [n.op_type for n in model.graph.node] == ["MatMulNBits", "Softmax", "MatMul", "TopK"]
    else:
        with pytest.raises(ExportError, match="no product"):
            quantized_graph(plain, [router], Blockwise("int4"))


def test_quantize_shared_weight_once() -> None:
    model, weights = quantized_graph(_graph(), WEIGHTS, Blockwise("int4"))
    assert [w.name for w in weights] == [
        "w_embedding_Q4", "w_embedding_scales", "w_up_Q4", "w_up_scales", "w_down_Q4", "w_down_scales",
        "w_conv_Q4", "w_conv_scales",
    ]  # fmt: skip
    named = [t.name for t in model.graph.initializer if t.name.startswith("w_")]
    assert sorted(named) == sorted(w.name for w in weights)
    quantized = [n.name for n in model.graph.node if n.op_type == "MatMulNBits"]
    layers = [f"layers.{i}.{name}_Q4" for i in range(2) for name in ("up", "down", "conv")]
    assert quantized == [*layers, "head_Q4"]


def test_quantize_kept_node_keeps_weight() -> None:
    model, weights = quantized_graph(_graph(), WEIGHTS, Blockwise("int4", keep=("layers.1.*", "head")))
    names = [w.name for w in weights]
    assert {"w_up", "w_up_Q4", "w_down", "w_down_Q4"} <= set(names)
    assert "w_embedding_Q4" not in names
    kinds = {n.name: n.op_type for n in model.graph.node}
    assert kinds["lookup"] == "Gather"  # the head keeps what it reads in the graph
    assert kinds["layers.1.up"] == "MatMul"
    assert kinds["layers.0.up_Q4"] == "MatMulNBits"


def test_quantize_shared_weight_with_one_8_bit_product() -> None:
    _, weights = quantized_graph(_graph(), WEIGHTS, Blockwise("int4", eight_bits=("layers.0.up",)))
    names = [w.name for w in weights if w.name.startswith("w_up")]
    assert names == ["w_up_Q8", "w_up_scales"]


@pytest.mark.parametrize(
    ("how", "bits"),
    [
        ({"eight_bits": ("gate",)}, {"up": 8, "down": 4, "conv": 4, "head": 4, "lookup": 4}),
        ({"eight_bits": ("emb*",)}, {"up": 4, "down": 4, "conv": 4, "head": 8, "lookup": 8}),
        ({"keep": ("emb*", "conv")}, {"up": 4, "down": 4}),
        ({"keep": ("*oo*",), "eight_bits": ("*up", "gate")}, {"up": 8, "down": 4, "conv": 4, "head": 4}),
    ],
)
def test_quantize_patterns_without_node_name_tensors(how: dict[str, Any], bits: dict[str, int]) -> None:
    """`lookup` has a node of its name, so the head that reads the same tensor is not meant."""
    model, _ = quantized_graph(_graph(), WEIGHTS, Blockwise("int4", **how))
    found = {
        n.name.split(".")[-1].partition("_")[0]: a.i
        for n in model.graph.node
        for a in n.attribute
        if a.name == "bits"
    }
    assert found == bits


def test_chosen_pattern_of_nodes_means_no_tensor() -> None:
    nodes = {"embed": {"embed.weight"}, "head": {"embed.weight"}, "a[0]": {"x.weight"}}
    assert chosen(nodes, ["*embed*"]) == {"embed"}
    assert chosen(nodes, ["*embed.weight"]) == {"embed", "head"}
    assert chosen(nodes, ["embed.weight", "nothing"]) == {"embed", "head"}
    assert chosen(nodes, escaped(["a[0]"])) == {"a[0]"}


def test_quantize_8_bits_with_8_bit_exceptions() -> None:
    with pytest.raises(ExportError, match="int8 with nodes of 8 bits"):
        Blockwise("int8", eight_bits=("head",)).check()


def test_quantize_scales_have_graph_type() -> None:
    halves = [Weight(w.name, w.file, "float16", w.shape, w.recipe) for w in WEIGHTS]
    model, weights = quantized_graph(_graph(onnx.TensorProto.FLOAT16), halves, Blockwise("int8", symmetric=False))
    types = {w.recipe.quantized.part: w.dtype for w in weights if w.recipe.quantized is not None}
    assert types == {"packed": "uint8", "scales": "float16", "zero_points": "uint8"}
    declared = {t.name: t.data_type for t in model.graph.initializer}
    assert declared["w_up_scales"] == onnx.TensorProto.FLOAT16


def test_quantize_weight_without_recipe_is_left() -> None:
    fixed = ("w_up", "w_embedding")
    constant = [Weight(w.name, w.file, w.dtype, w.shape) if w.name in fixed else w for w in WEIGHTS]
    _, weights = quantized_graph(_graph(), constant, Blockwise("int4"))
    names = {w.name for w in weights}
    assert {"w_up", "w_embedding", "w_down_Q4"} <= names
    assert not {"w_up_Q4", "w_embedding_Q4"} & names


@pytest.mark.parametrize(
    ("precision", "options", "found"),
    [
        ("int4", QuantizationOptions(block_size=24), "blocks of 24"),
        ("int4", QuantizationOptions(block_size=8), "blocks of 8"),
        ("int4", QuantizationOptions(accuracy_level=5), "accuracy level 5"),
        ("int8", QuantizationOptions(block_size=0), "blocks of 0"),
        ("nf4", QuantizationOptions(symmetric=False), "nf4 with zero points"),
        ("nf4", QuantizationOptions(algorithm="rtn"), "nf4 with rtn"),
    ],
)
def test_quantize_unknown_settings_are_refused(
    precision: Precision, options: QuantizationOptions, found: str
) -> None:
    with pytest.raises(ExportError, match=found) as refused:
        blockwise(precision, "cpu", options, generates=True)
    assert refused.value.expected
    assert refused.value.next_step


def test_quantize_k_quant_has_zero_points() -> None:
    how = blockwise("int4", "cpu", QuantizationOptions(algorithm="k_quant"), generates=True)
    assert how is not None
    assert not how.symmetric
    with pytest.raises(ExportError, match="without zero points"):
        Blockwise("int4", algorithm="k_quant").check()


def test_quantize_without_products_is_refused() -> None:
    with pytest.raises(ExportError, match="no product"):
        quantized_graph(_graph(), WEIGHTS, Blockwise("int4", keep=("*",)))
