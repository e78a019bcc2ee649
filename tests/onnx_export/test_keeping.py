"""What is kept in high precision: damage as a quantized graph really does it, and the choice by it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from lora_export.contracts import AdapterChoice, ExportOptions, ExportResult, MergeOptions, QuantizationOptions
from lora_export.errors import InputError
from lora_export.graph_runs.feeds import Feed
from lora_export.merging import merge
from lora_export.onnx_export import export
from lora_export.onnx_export.graphs.checks import open_model
from lora_export.onnx_export.quantize import sensitivity
from lora_export.onnx_export.quantize.calibration import CalibrationText, Rows
from lora_export.onnx_export.quantize.feeding import Stage, stages
from lora_export.onnx_export.quantize.numbers import dequantize, quantize
from lora_export.onnx_export.quantize.sensitivity import Damage, choose_kept, mark
from lora_export.onnx_export.quantize.settings import STATISTICS, Blockwise, blockwise
from lora_export.onnx_export.quantize.statistics import Statistics
from lora_export.onnx_export.weights import map as weights_map
from lora_export.progress import Silent
from lora_export.workflows.exporting import knowing_touched
from tests.builders import handmade_adapter, handmade_base, tensors
from tests.onnx_export.architectures import DYNAMO, save
from tests.onnx_export.conftest import VOCABULARY, feeds_of, quantized_graph, save_llama, save_tokenizer

Array = np.ndarray[Any, Any]
INT4 = Blockwise("int4", accuracy_level=1, embeddings=False)  # products alone are measured
SENSITIVE = "/model/layers.1/mlp/down_proj/MatMul"


@pytest.fixture(scope="module")
def sensitive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of which one matrix has an outlier in every block."""
    from transformers import LlamaForCausalLM

    folder = save_llama(tmp_path_factory.mktemp("models") / "sensitive", seed=5, tied=False)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.model.layers[1].mlp.down_proj.weight.data[:, ::32] *= 20
    model.save_pretrained(folder)
    return folder


def _rows(count: int = 3) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(4, VOCABULARY, size=9 + 4 * i).tolist() for i in range(count)]


def _measured(plain: Path, how: Blockwise, feeds: Sequence[Feed], **more: Any) -> tuple[Damage, ...]:
    return choose_kept([Stage(plain, feeds, 0, 0)], how, progress=Silent(), **more)


def _int4(plain: Path, keep: tuple[str, ...], how: Blockwise = INT4) -> onnx.ModelProto:
    """The quantized graph, with its numbers, made of those of the graph in fp32."""
    known = weights_map.read(plain.parent).weights
    values = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(plain).graph.initializer}
    made_of = {(w.recipe.pieces, w.recipe.transposed): values[w.name] for w in known if w.recipe.pieces}
    model, weights = quantized_graph(onnx.load(plain), known, replace(how, keep=keep))
    tensors = {t.name: t for t in model.graph.initializer}
    for weight in weights:
        settings, recipe = weight.recipe.quantized, weight.recipe
        if settings is not None:
            stored = made_of.get((recipe.pieces, recipe.transposed))
            matrix = made_of[recipe.pieces, not recipe.transposed].T if stored is None else stored
            value = quantize(matrix, settings)[settings.part]
            tensors[weight.name].CopyFrom(onnx.numpy_helper.from_array(value, weight.name))
    return model


def _logits(model: onnx.ModelProto, feeds: Any) -> list[Array]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(session.run(["logits"], dict(feed))[0]) for feed in feeds]


def _divergence(expected: list[Array], found: list[Array]) -> float:
    """torch's, in fp64."""
    values = []
    for a, b in zip(expected, found, strict=True):
        p, q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (a, b))
        values.append(float(torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()))
    return float(np.mean(values))


def test_sensitivity_damage_matches_quantized_graph(exported: Callable[..., ExportResult], sensitive: Path) -> None:
    plain = exported(sensitive).model
    feeds = feeds_of(plain, _rows())
    measured = _measured(plain, INT4, feeds, logits="logits", budget=1)
    assert len(measured) == 11
    found = {d.nodes: d for d in measured}
    others = tuple(n for d in measured for n in d.nodes if n != SENSITIVE)
    expected = _logits(onnx.load(plain), feeds)
    real = _divergence(expected, _logits(_int4(plain, others), feeds))
    assert found[(SENSITIVE,)].damage == pytest.approx(real, rel=1e-3)
    assert real > 3 * found[(SENSITIVE.replace("1", "0"),)].damage

    keep = tuple(n for d in measured if d.kept for n in d.nodes)
    better = _divergence(expected, _logits(_int4(plain, keep), feeds))
    worse = _divergence(expected, _logits(_int4(plain, ()), feeds))
    assert better < worse / 2


@pytest.mark.slow
def test_sensitivity_tied_head_is_measured_as_head(exported: Callable[..., ExportResult], tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(6)
    sizes = {"n_embd": 64, "n_inner": 112, "n_layer": 1, "n_head": 4, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, initializer_range=0.3, **sizes)).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    plain = exported(tmp_path).model
    feeds = feeds_of(plain, _rows(1))
    measured = _measured(plain, INT4, feeds, logits="logits")
    (head,) = (d for d in measured if d.nbytes == 4 * VOCABULARY * 64 - VOCABULARY * (32 + 2 * 4))
    others = tuple(n for d in measured for n in d.nodes if n not in head.nodes)
    expected = _logits(onnx.load(plain), feeds)
    real = _divergence(expected, _logits(_int4(plain, others), feeds))
    assert head.damage == pytest.approx(real, rel=1e-3)


def test_sensitivity_bytes_match_growth_of_weights(exported: Callable[..., ExportResult], sensitive: Path) -> None:
    plain = exported(sensitive).model
    measured = _measured(plain, INT4, feeds_of(plain, _rows(1)))
    one = next(d for d in measured if d.nodes == (SENSITIVE,))
    sizes = [
        sum(onnx.numpy_helper.to_array(t).nbytes for t in _int4(plain, keep).graph.initializer)
        for keep in ((SENSITIVE,), ())
    ]
    assert sizes[0] - sizes[1] == one.nbytes


def test_sensitivity_8_bits_cost_less_than_32(exported: Callable[..., ExportResult], sensitive: Path) -> None:
    plain = exported(sensitive).model
    feeds = feeds_of(plain, _rows(1))
    measured = _measured(plain, INT4, feeds, logits="logits", eight_bits=True)
    one = next(d for d in measured if d.nodes == (SENSITIVE,))
    assert one.nbytes == 4 * 32 * 64 / 2  # half a byte more for each of four whole blocks
    assert any(d.kept for d in measured)


def test_sensitivity_of_encoder_is_output_error(exported: Callable[..., ExportResult], bert: Path) -> None:
    result = exported(bert)
    feeds = feeds_of(result.model, _rows())
    measured = _measured(result.model, Blockwise("nf4", 64), feeds, budget=2)
    assert all(0 < d.damage < 1 for d in measured)
    grown = sum(d.nbytes for d in measured if d.kept)
    assert 0 < grown < sum(d.nbytes for d in measured)


@pytest.mark.slow
def test_sensitivity_of_encoder_reaches_logits_of_decoder(
    exported: Callable[..., ExportResult], tmp_path: Path
) -> None:
    """Beside transformers' model with one weight quantized, of which encoder and decoder read the same text."""
    from transformers import T5ForConditionalGeneration

    folder = save(DYNAMO["T5ForConditionalGeneration"], tmp_path / "t5")
    paths = exported(folder).paths
    text = CalibrationText(tmp_path, "abc defg\nhi\tjkl\n" * 3, "")
    (tmp_path / "between").mkdir()
    run, _, _ = stages(paths, folder, text, 60, tmp_path / "between")
    measured = choose_kept(run, INT4, logits="logits", progress=Silent())
    model = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    pairs = Rows.of(folder).pairs(text.lines, 0, 60)

    def logits() -> list[Array]:
        with torch.no_grad():
            given = [(torch.tensor([a]), torch.tensor([b])) for a, b in pairs]
            return [model(input_ids=a, decoder_input_ids=b).logits.numpy() for a, b in given]

    expected, found = logits(), {d.tensors[0]: d.damage for d in measured}
    for name in ("encoder.block.1.layer.1.DenseReluDense.wo", "decoder.block.0.layer.0.SelfAttention.o"):
        weight = model.get_parameter(f"{name}.weight").data
        plain = weight.clone()
        arrays = quantize(np.ascontiguousarray(plain.numpy().T), INT4.settings)
        weight.copy_(torch.from_numpy(dequantize(arrays, *weight.T.shape, INT4.settings).T))
        assert found[f"{name}.weight"] == pytest.approx(_divergence(expected, logits()), rel=2e-3)
        weight.copy_(plain)


@pytest.mark.slow
def test_sensitivity_with_gptq_tries_the_numbers_of_the_export(
    exported: Callable[..., ExportResult], sensitive: Path, tmp_path: Path
) -> None:
    options = ExportOptions("int4", "cpu", quantization=QuantizationOptions(algorithm="gptq", embeddings=False))
    made = export(sensitive, tmp_path / "onnx", options, progress=Silent())
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(made.model).graph.initializer}
    arrays: dict[Any, dict[Any, Array]] = {}
    for part in weights_map.read(made.output).weights:
        if part.recipe.quantized is not None:
            arrays.setdefault(part.recipe.pieces, {})[part.recipe.quantized.part] = stored[part.name]
    plain = exported(sensitive).output
    how = blockwise("int4", "cpu", options.quantization, True)
    assert how is not None
    weights = weights_map.read(plain).weights
    products = sensitivity._quantized([open_model(plain / "model.onnx")], weights, how)
    statistics = Statistics.open(made.output / STATISTICS)
    for product in products:
        _, tried = sensitivity._simulated(plain, product, how, statistics)
        weight = product.product.weight
        exact = dequantize(
            arrays[weight.recipe.pieces], product.product.rows, product.product.columns, how.settings
        )
        assert np.array_equal(tried, exact)
    assert len(products) == 11


def test_sensitivity_groups_many_products(exported: Callable[..., ExportResult], sensitive: Path) -> None:
    plain = exported(sensitive).model
    feeds = feeds_of(plain, _rows(1))
    measured = _measured(plain, INT4, feeds, logits="logits", groups=6)
    groups = {d.name: d.nodes for d in measured}
    assert len(groups) == 6
    assert groups["model.layers.0-1.mlp.down_proj.weight"] == (SENSITIVE.replace("1", "0"), SENSITIVE)


def _damage(name: str, damage: float, nbytes: int) -> Damage:
    return Damage(name, (name,), damage, nbytes)


def test_keep_auto_spends_budget_on_worst_per_byte() -> None:
    measured = [_damage("a", 8, 400), _damage("b", 9, 100), _damage("c", 1, 1000), _damage("d", 4, 90)]
    found = mark(measured, budget=200)
    assert [(d.name, d.kept) for d in found] == [("b", True), ("d", True), ("a", False), ("c", False)]


def test_keep_auto_ignores_average_damage() -> None:
    assert not any(d.kept for d in mark([_damage("a", 1, 10), _damage("b", 2, 20)], budget=10**6))


def test_sensitivity_graph_with_other_inputs_is_refused(
    exported: Callable[..., ExportResult], tmp_path: Path
) -> None:
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["pixels"], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info("pixels", 1, [1])],
        [onnx.helper.make_tensor_value_info("y", 1, [1])],
    )
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    with pytest.raises(InputError, match="pixels"):
        feeds_of(tmp_path / "model.onnx", [[1]])


def test_keep_touched_knows_what_a_merge_changed(tmp_path: Path) -> None:
    """From the base and its adapter as from the merged folder, and beside the bytes of both."""
    base = handmade_base(tmp_path / "base", {"m.proj.weight": (9, 8), "m.other.weight": (7, 5)}, torch.float32)
    adapter = AdapterChoice(
        handmade_adapter(tmp_path / "adapter", {"m.proj": (torch.ones(2, 8), torch.ones(9, 2))})
    )
    merge(base, [adapter], tmp_path / "merged", MergeOptions())
    before, after = tensors(base), tensors(tmp_path / "merged")
    changed = tuple(name for name in after if not torch.equal(before[name], after[name]))
    options = ExportOptions("int4", quantization=QuantizationOptions(keep=("touched",)))
    assert knowing_touched(options, tmp_path / "merged").quantization.touched == changed == ("m.proj.weight",)
    assert knowing_touched(options, base, [adapter]).quantization.touched == changed
    assert knowing_touched(options, base).quantization.touched == ()
