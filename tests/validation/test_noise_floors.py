"""Noise floors belong to the unmerged model in PyTorch, so a fault that base and merged graph share is caught."""

import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from lora_export.choices import Precision
from lora_export.contracts import AdapterChoice, Check, ExportedPair, ExportOptions, ValidationResult
from lora_export.errors import ExportError
from lora_export.merging import merge
from lora_export.onnx_export import export, reweight
from lora_export.progress import Silent
from lora_export.validation import validate
from lora_export.validation.comparing.logits import UNMOVED, compare_logits, largest
from lora_export.validation.comparing.noise import Magnitudes, rounding_noise
from lora_export.validation.comparing.thresholds import Floor, Greedy, decoder_checks, graph_checks
from lora_export.validation.graphs import weights as graph_weights
from lora_export.validation.graphs.numbers import numbers_of
from tests.builders import lora, save_adapter
from tests.daily import daily
from tests.onnx_export.architectures import DYNAMO, save
from tests.onnx_export.architectures import save_adapter as save_adapter_of
from tests.validation.conftest import judged, save_base


@dataclass
class Exported:
    """A base, its adapter, their merge, and both exported with one graph."""

    root: Path
    base: Path
    adapter: Path

    def pair(self, precision: Precision, folder: Path | None = None) -> ExportedPair:
        """The pair in a precision; copies in `folder`, free to be spoiled."""
        plain, merged = self.root / f"base-{precision}", self.root / f"onnx-{precision}"
        if not merged.exists():
            export(self.base, plain, ExportOptions(precision, "cpu"), progress=Silent())
            reweight(plain, self.root / "merged", merged, progress=Silent())
        if folder is not None:
            plain, merged = (shutil.copytree(f, folder / f.name) for f in (plain, merged))
        return ExportedPair(merged, plain, precision, 1)

    def judged(self, pair: ExportedPair) -> ValidationResult:
        return judged(self.base, self.adapter, self.root / "merged", [pair])


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    root = tmp_path_factory.mktemp("decoder")
    base = save_base(root / "base", torch.float32)
    adapter = save_adapter(
        root / "adapter", base, lora(target_modules=["q_proj", "v_proj", "down_proj"]), scale=0.1
    )
    merge(base, [AdapterChoice(adapter)], root / "merged")
    return Exported(root, base, adapter)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    root = tmp_path_factory.mktemp("encoder")
    architecture = DYNAMO["BertModel"]
    base = save(architecture, root / "base")
    save_adapter_of(architecture, base, root / "adapter")
    merge(base, [AdapterChoice(root / "adapter")], root / "merged")
    return Exported(root, base, root / "adapter")


def failed(result: ValidationResult) -> set[str]:
    return {c.name for c in result.checks if not c.passed}


def spoil(pair: ExportedPair, change: Any) -> None:
    """The same fault in the graphs of base and merged."""
    for folder in (pair.merged, pair.base):
        path = folder / "model.onnx"
        model = onnx.load(str(path), load_external_data=False)
        change(model)
        onnx.save(model, str(path))


def set_attribute(name: str, value: float) -> Any:
    def change(model: onnx.ModelProto) -> None:
        nodes = [
            n
            for n in model.graph.node
            if n.op_type in ("GroupQueryAttention", "Attention", "SkipLayerNormalization")
        ]
        chosen = [n for n in nodes if (name == "epsilon") == (n.op_type == "SkipLayerNormalization")]
        assert chosen
        for node in chosen:
            for attribute in [a for a in node.attribute if a.name == name]:
                node.attribute.remove(attribute)
            node.attribute.append(onnx.helper.make_attribute(name, value))

    return change


# --- faults of the graph -----------------------------------------------------------------------------------

FAULTS = {
    "attention without effect": ("encoder", "scale", 0.0001),
    "attention too sharp": ("encoder", "scale", 2.0),
    "epsilon": ("encoder", "epsilon", 0.5),
    "softcap": ("decoder", "softcap", 1.0),
}


@pytest.mark.parametrize("fault", daily(FAULTS, ("attention too sharp", "softcap")))
def test_validate_graph_fault_shared_with_base_fails(
    fault: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    kind, name, value = FAULTS[fault]
    exported: Exported = request.getfixturevalue(kind)
    honest = exported.judged(exported.pair("fp32"))
    assert honest.passed, failed(honest)
    pair = exported.pair("fp32", tmp_path)
    spoil(pair, set_attribute(name, value))
    found = failed(exported.judged(pair))
    assert any("graph" in n for n in found) and "onnx_logits_max_abs" in found


def test_validate_int4_scales_of_one_tensor_changed_fails(decoder: Exported, tmp_path: Path) -> None:
    assert failed(decoder.judged(decoder.pair("int4"))) <= {"onnx_adapter_survival"}
    pair = decoder.pair("int4", tmp_path)
    for folder in (pair.merged, pair.base):
        entries = json.loads((folder / graph_weights.NAME).read_text())["weights"]
        entry = next(e for e in entries if e.get("quantized", {}).get("part") == "scales")
        data = np.memmap(folder / entry["file"], np.float32, "r+", entry["offset"], tuple(entry["shape"]))
        data *= 1.3
        data.flush()
    found = failed(decoder.judged(pair))
    assert {"onnx_weight_errors", "onnx_base_weight_errors"} <= found


def ignore_mask(model: onnx.ModelProto) -> None:
    """Every token counts, padding too."""
    for name, number in (("zero_instead", 0), ("one_instead", 1)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(number, np.int64), name))
    for node in model.graph.node:
        node.input[:] = ["whole_mask" if n == "attention_mask" else n for n in node.input]
    whole = onnx.helper.make_node("Add", ["no_mask", "one_instead"], ["whole_mask"])
    model.graph.node.insert(0, whole)
    model.graph.node.insert(0, onnx.helper.make_node("Mul", ["attention_mask", "zero_instead"], ["no_mask"]))


@pytest.mark.parametrize(
    ("kind", "check"), [("encoder", "onnx_logits_max_abs"), ("decoder", "onnx_padded_max_abs")]
)
def test_validate_padding_that_is_not_masked_fails(
    kind: str, check: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A decoder's trailing padding shows when the batch goes on from its cache."""
    exported: Exported = request.getfixturevalue(kind)
    pair = exported.pair("fp32", tmp_path)
    spoil(pair, ignore_mask)
    assert check in failed(exported.judged(pair))


@pytest.mark.parametrize("called", ["itself", "another"])
def test_validate_numbers_that_the_data_files_do_not_hold_fail(
    called: str, encoder: Exported, tmp_path: Path
) -> None:
    """The graph holds 1.001 times a bias itself, under its own name or beside it; the data file stays right."""
    pair = encoder.pair("fp32", tmp_path)

    def inline(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name.endswith("output.dense.bias"))
        changed = onnx.numpy_helper.to_array(tensor, str(pair.merged)) * np.float32(1.001)
        if called == "itself":
            tensor.CopyFrom(onnx.numpy_helper.from_array(changed, tensor.name))
            return
        model.graph.initializer.append(onnx.numpy_helper.from_array(changed, "beside"))
        for node in model.graph.node:
            node.input[:] = ["beside" if n == tensor.name else n for n in node.input]

    spoil(pair, inline)
    assert {"onnx_weight_errors", "onnx_base_weight_errors"} <= failed(encoder.judged(pair))


def test_validate_graph_that_answers_nan_to_padding_fails(encoder: Exported, tmp_path: Path) -> None:
    """0/0 wherever the mask has a zero."""
    pair = encoder.pair("fp32", tmp_path)

    def poison(model: onnx.ModelProto) -> None:
        output = model.graph.output[0].name
        for node in model.graph.node:
            node.output[:] = ["before_poison" if n == output else n for n in node.output]
            node.input[:] = ["before_poison" if n == output else n for n in node.input]
        make = onnx.helper.make_node
        model.graph.node.extend([
            make("Cast", ["attention_mask"], ["mask_float"], to=onnx.TensorProto.FLOAT),
            make("ReduceMin", ["mask_float"], ["least"], keepdims=0),
            make("Div", ["least", "least"], ["poison"]),
            make("Mul", ["before_poison", "poison"], [output]),
        ])  # fmt: skip

    spoil(pair, poison)
    found = failed(encoder.judged(pair))
    assert {"onnx_logits_max_abs", "onnx_embedding_cosine"} <= found


def test_validate_quantized_graph_without_its_map_is_refused(decoder: Exported, tmp_path: Path) -> None:
    pair = decoder.pair("int4", tmp_path)
    (pair.merged / graph_weights.NAME).unlink()
    with pytest.raises(ExportError, match="no weights-map"):
        decoder.judged(pair)


# --- no false alarm ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [2.0, 1e-4])
def test_validate_honest_merge_of_any_update_size_passes(share: float, tmp_path: Path) -> None:
    """An update that is twice its weights makes their rounding errors larger than those of the base."""
    base = save_base(tmp_path / "base", torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base, lora(target_modules=["q_proj", "v_proj", "down_proj"]))
    _scale_update(tmp_path / "adapter", base, share)
    merge(base, [AdapterChoice(adapter)], tmp_path / "merged")
    result = validate(base, [AdapterChoice(adapter)], tmp_path / "merged", progress=Silent())
    assert result.passed, [c for c in result.checks if not c.passed]


def _scale_update(adapter: Path, base: Path, share: float) -> None:
    """Make the update of every weight `share` times as large as the weight."""
    from safetensors.torch import save_file

    weights, factors = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    for name in [n for n in factors if "lora_B" in n]:
        a = factors[name.replace("lora_B", "lora_A")].float()
        delta = config["lora_alpha"] / config["r"] * factors[name].float() @ a
        plain = name.removeprefix("base_model.model.").replace(".lora_B.weight", ".weight")
        factors[name] = factors[name] * (share * weights[plain].float().norm() / delta.norm())
    save_file(factors, adapter / "adapter_model.safetensors")


def test_magnitudes_of_an_adapted_layer_are_those_of_its_merged_weight(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", torch.float32)
    adapter = save_adapter(tmp_path / "adapter", base, lora(target_modules=["v_proj"]), scale=0.5)
    merge(base, [AdapterChoice(adapter)], tmp_path / "merged")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    unmerged = peft.PeftModel.from_pretrained(model, adapter)
    sizes = Magnitudes.of(unmerged)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    name = "model.layers.0.self_attn.v_proj"
    weight = dict(unmerged.base_model.model.named_parameters())[f"{name}.base_layer.weight"]
    wanted = merged[f"{name}.weight"].float().square().mean(1).sqrt()
    found = sizes.adapted(f"{name}.base_layer.weight", weight.data).square().mean(1).sqrt()
    assert (wanted / weight.data.square().mean(1).sqrt()).max() > 2  # the adapter matters here
    torch.testing.assert_close(found, wanted, rtol=0.5, atol=0)
    assert torch.equal(sizes.adapted("model.norm.weight", weight.data), weight.data)


def test_rounding_noise_is_as_large_as_the_rounding_of_adapted_weights(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", torch.float32)
    adapter = save_adapter(tmp_path / "adapter", base, lora(target_modules=["v_proj"]), scale=2.0)
    merge(base, [AdapterChoice(adapter)], tmp_path / "merged")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    unmerged = peft.PeftModel.from_pretrained(model, adapter)
    name = "model.layers.0.self_attn.v_proj"
    weight = dict(unmerged.base_model.model.named_parameters())[f"{name}.base_layer.weight"]
    before = weight.data.clone()
    with rounding_noise(unmerged, {f"{name}.weight": torch.bfloat16}, 0):
        moved = (weight.data - before).square().mean().sqrt()
    merged = load_file(tmp_path / "merged" / "model.safetensors")[f"{name}.weight"]
    rounded = (merged.bfloat16().float() - merged).square().mean().sqrt()
    assert rounded > 3 * (before.bfloat16().float() - before).square().mean().sqrt()
    assert float(moved / rounded) == pytest.approx(1, abs=0.3)


# --- the numbers of a graph, and figures that are none ------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int4", "int8"])
def test_graph_weights_are_the_checkpoints(decoder: Exported, precision: Precision) -> None:
    pair = decoder.pair(precision)
    merged = load_file(decoder.root / "merged" / "model.safetensors")
    wanted, seen = numbers_of(decoder.root / "merged"), set()
    for held in graph_weights.read(pair.merged_graphs, {n: tuple(t.shape) for n, t in merged.items()}):
        exact = wanted(held)
        assert exact is not None
        error = float((held.values - exact).norm() / exact.norm())
        assert error < {"fp32": 1e-9, "fp16": 1e-3, "int4": 0.15, "int8": 0.01}[precision], held.tensor
        assert (held.quantized is not None) <= (precision in ("int4", "int8"))
        seen.add(held.tensor)
    assert seen == set(merged)


def test_every_kind_tells_what_is_left_of_its_adapter(encoder: Exported) -> None:
    honest = encoder.judged(encoder.pair("fp32"))
    survival = next(c for c in honest.checks if c.name == "onnx_adapter_survival")
    assert survival.value == pytest.approx(1, abs=1e-4) and survival.threshold == 0.9
    pair = encoder.pair("fp32")
    bare = encoder.judged(replace(pair, merged=pair.base))
    assert next(c for c in bare.checks if c.name == "onnx_adapter_survival").value == pytest.approx(0, abs=1e-4)


def logits_like(**changes: float) -> Any:
    tokens = [torch.tensor([0, 1, 2])]
    same = compare_logits([torch.eye(3)], [torch.eye(3)], tokens)
    return replace(same, **{k: (v,) if k == "kl" else v for k, v in changes.items()})


@pytest.mark.parametrize("field", ["max_abs", "kl", "top1", "top5", "nll_found", "nll_spread"])
def test_decoder_checks_fail_on_what_is_no_number(field: str) -> None:
    floor = Floor(((replace(UNMOVED, max_abs=0.1),),), 1.0, "made up")
    agreeing = Greedy(1.0, (), str)
    found = decoder_checks(floor, logits_like(**{field: math.nan}), agreeing)
    noisy = Floor(((logits_like(**{field: math.nan}),),), 1.0, "made up")
    judged = [*found, *graph_checks(floor, logits_like(**{field: math.nan}), 4.0, "graph")]
    if field != "nll_spread":  # an outcome; the spread is a floor alone
        assert any(not c.passed for c in judged)
    if field != "nll_found":  # a floor; the mean is an outcome alone
        assert any(not c.passed for c in decoder_checks(noisy, logits_like(), agreeing))


def test_thresholds_that_everything_satisfies_fail() -> None:
    loud = Floor(((replace(UNMOVED, top1=0.6, max_abs=math.inf),),), 1.0, "made up")
    checks: dict[str, Check] = {c.name: c for c in decoder_checks(loud, logits_like(), Greedy(1.0, (), str))}
    assert not checks["top1_agreement"].passed and "leaves nothing to compare" in checks["top1_agreement"].note
    assert not checks["logits_max_abs"].passed


def test_largest_keeps_nan() -> None:
    assert math.isnan(largest([1.0, math.nan])) and math.isnan(largest([math.nan, 1.0]))
    assert largest([]) == 0.0 and largest([1.0, 2.0]) == 2.0
