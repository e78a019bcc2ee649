"""What stands for operators that browsers lack computes the same, in ONNX Runtime on the processor."""

import json
import re
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from lora_export.packages import browsers, graphs
from lora_export.packages.job import PackageFacts, Sample
from lora_export.packages.programs import web_page
from lora_export.packages.targets import transformers_js
from lora_export.packages.tasks import task_of
from lora_export.progress import Silent

FLOAT, HALF, INT32, INT64 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT32, ir.DataType.INT64
HEADS, SIZE = 2, 4
WIDTH = HEADS * SIZE


def initializer(name: str, values: Any) -> ir.Value:
    return ir.val(name, const_value=ir.tensor(values, name=name))


def model_of(
    kind: str, inputs: list[ir.Value | None], given: list[ir.Value], count: int = 1, **attributes: Any
) -> ir.Model:
    """One node of com.microsoft, whose outputs are the graph's. given: the graph's inputs; count: of outputs."""
    dtype = next(v.dtype for v in reversed(inputs) if v is not None and v.dtype in (FLOAT, HALF))
    outputs = [ir.val(f"out{i}", dtype) for i in range(count)]
    node = ir.node(kind, inputs, attributes, domain="com.microsoft", name="node", outputs=outputs)
    weights = [v for v in inputs if v is not None and v.const_value is not None]
    versions = {"": 17, "com.microsoft": 1}
    graph = ir.Graph(given, outputs, nodes=[node], initializers=weights, opset_imports=versions, name="graph")
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model, feeds: dict[str, Any]) -> Any:
    return ort.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, feeds)[0]


def operators(model: ir.Model) -> set[str]:
    return {node.op_type for node in model.graph}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("bits", "blocks"), [(8, 2), (4, 2), (4, 3)])
def test_adapt_lookup_of_blocks_gives_equal_numbers(
    bits: int, blocks: int, zeros: bool, dtype: Any, known: bool
) -> None:
    """known: whether the graph's types are, which those that were taken apart have forgotten."""
    random = np.random.default_rng(3)
    rows, block = 7, 16
    table = initializer("table", random.integers(0, 256, (rows, blocks * block * bits // 8), np.uint8))
    scales = initializer("scales", random.normal(size=(rows, blocks)).astype(dtype))
    points = random.integers(0, 256, (rows, -(-blocks * bits // 8)), np.uint8)
    ids = ir.val("ids", INT64, ["rows", "length"])
    inputs = [table, ids, scales, *([initializer("points", points)] if zeros else [])]
    model = model_of(
        "GatherBlockQuantized", inputs, [ids], bits=bits, block_size=block, gather_axis=0, quantize_axis=1
    )
    feeds = {"ids": np.array([[0, 6, 3], [2, 2, 5]])}
    wanted = run(model, feeds)
    assert wanted.shape == (2, 3, blocks * block) and len(np.unique(wanted)) > 50
    if not known:
        graphs.forget_types(model)
        scales.type = scales.shape = None
    browsers.adapt(model)
    assert "GatherBlockQuantized" not in operators(model)
    np.testing.assert_array_equal(run(model, feeds), wanted)


MASK = np.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]], np.int32)


def feeds_of(*names: str, length: int = 5) -> dict[str, Any]:
    random = np.random.default_rng(4)
    return {name: random.normal(size=(2, length, WIDTH)).astype(np.float32) for name in names}


def test_adapt_masked_attention_gives_near_numbers() -> None:
    random = np.random.default_rng(5)
    states, mask = ir.val("states", FLOAT, ["rows", "length", WIDTH]), ir.val("mask", INT32, ["rows", "length"])
    weight = initializer("weight", random.normal(size=(WIDTH, 3 * WIDTH)).astype(np.float32))
    bias = initializer("bias", random.normal(size=3 * WIDTH).astype(np.float32))
    model = model_of("Attention", [states, weight, bias, mask], [states, mask], num_heads=HEADS)
    check(model, {**feeds_of("states"), "mask": MASK}, "mask", np.ones_like(MASK))


@pytest.mark.parametrize("filtered", [None, -3.0])
def test_adapt_masked_multi_head_attention_gives_near_numbers(filtered: float | None) -> None:
    """A filter of -3 does not hide a key altogether."""
    query, key, value = (ir.val(n, FLOAT, ["rows", "length", WIDTH]) for n in ("query", "key", "value"))
    mask = ir.val("mask", INT32, ["rows", "length"])
    given = {"mask_filter_value": filtered} if filtered else {}
    inputs = [query, key, value, None, mask]
    model = model_of("MultiHeadAttention", inputs, [query, key, value, mask], num_heads=HEADS, **given)
    check(model, {**feeds_of("query", "key", "value"), "mask": MASK}, "mask", np.ones_like(MASK))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("past", [0, 3])
def test_adapt_one_way_attention_behind_cache_gives_near_numbers(past: int, known: bool) -> None:
    query, key, value = (ir.val(n, FLOAT, ["rows", "length", WIDTH]) for n in ("query", "key", "value"))
    bias = ir.val("bias", FLOAT, [1, 1, "length", "total"])
    cache = [ir.val(n, FLOAT, ["rows", HEADS, "past", SIZE]) for n in ("past_key", "past_value")]
    inputs = [query, key, value, None, None, bias, *cache]
    given = [query, key, value, bias, *cache]
    model = model_of("MultiHeadAttention", inputs, given, 3, num_heads=HEADS, unidirectional=1)
    random = np.random.default_rng(6)
    pasts = {c.name: random.normal(size=(2, HEADS, past, SIZE)).astype(np.float32) for c in cache}
    added = random.normal(size=(1, 1, 5, past + 5)).astype(np.float32)
    feeds = {**feeds_of("query", "key", "value"), **pasts, "bias": added}
    if not known:
        model.graph.insert_before(model.graph[0], made := ir.node("Identity", [query], name="before"))
        made.outputs[0].name = "made"
        model.graph[1].replace_input_with(0, made.outputs[0])
    check(model, feeds, "bias", np.zeros_like(added))


def check(model: ir.Model, feeds: dict[str, Any], mask: str, other: Any) -> None:
    """Adapted, the model computes what it did; without the mask it computes something else."""
    wanted, without = run(model, feeds), run(model, {**feeds, mask: other})
    assert np.abs(wanted - without).max() > 0.05
    assert list(browsers.remaining(model)) == ["node"]
    browsers.adapt(model)
    assert not list(browsers.remaining(model))
    np.testing.assert_allclose(run(model, feeds), wanted, atol=1e-6)


def test_adapt_makes_one_bias_of_a_mask_that_two_nodes_read() -> None:
    states, mask = ir.val("states", FLOAT, ["rows", "length", WIDTH]), ir.val("mask", INT32, ["rows", "length"])
    nodes = [
        ir.node("MultiHeadAttention", [states, states, states, None, mask], {"num_heads": HEADS},
                domain="com.microsoft", name=f"node{i}", outputs=[ir.val(f"out{i}", FLOAT)])
        for i in range(2)
    ]  # fmt: skip
    graph = ir.Graph(
        [states, mask], [n.outputs[0] for n in nodes], nodes=nodes, name="graph",
        opset_imports={"": 17, "com.microsoft": 1},
    )  # fmt: skip
    model = ir.Model(graph, ir_version=10)
    browsers.adapt(model)
    assert [n.op_type for n in graph].count("Expand") == 1
    assert nodes[0].inputs[5] is nodes[1].inputs[5] is not None


def test_lay_warns_of_table_that_browsers_cannot_read() -> None:
    """One that is quantized along its rows: it stays, and Node runs it."""
    table = initializer("table", np.zeros((16, 3, 2), np.uint8))
    scales, ids = initializer("scales", np.ones((16, 3, 1), np.float32)), ir.val("ids", INT64, ["length"])
    attributes = {"bits": 4, "block_size": 16, "gather_axis": 0, "quantize_axis": 2}
    model = model_of("GatherBlockQuantized", [table, ids, scales], [ids], **attributes)
    warned: list[str] = []

    class Talk(Silent):
        def warn(self, text: str) -> None:
            warned.append(text)

    transformers_js._adapt(Talk(), "q4", model)
    assert operators(model) == {"GatherBlockQuantized"}
    assert warned == ["q4 runs on Node only: browsers have no operator for node"]


def test_page_of_readme_quotes_prompt() -> None:
    """A prompt cannot end the script, nor the block of code in the README."""
    prompt = "</script><img>\n```\n'"
    task = task_of("text-generation-with-past", "LlamaForCausalLM")
    facts = PackageFacts(
        transformers_js.TARGET, "name", task, "fp32", ("fp32", "q4"), ("cpu",), Sample(prompt, "said"), {}
    )
    page = web_page(facts, "model", "fp32")
    assert page.count("</script>") == 2 and "<img>" not in page and "\n```" not in page
    quoted = re.search(r"await reader\((.*)\);", page)
    assert quoted and json.loads(quoted[1]) == prompt
    assert page in transformers_js.TARGET.notes(facts)
