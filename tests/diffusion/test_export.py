"""Pipelines exported to ONNX: Optimum's layout and names, the proof of each graph, refusals before any work.

One model is exported daily, in this process; whole families and Optimum itself are slow.
"""

import importlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_export.contracts import Component, ExportOptions, ExportResult, Pipeline, QuantizationOptions
from lora_export.errors import ExportError, InputError, RuntimeUnavailable
from lora_export.graph_runs.taken_apart import take_apart
from lora_export.onnx_export import export, reweight
from lora_export.onnx_export.diffusion import pipeline_export
from lora_export.onnx_export.diffusion.components import own_half, parts_of, placed
from lora_export.onnx_export.engines.dynamo_passes import group_norm
from lora_export.onnx_export.engines.dynamo_passes.halving import halve
from lora_export.onnx_export.engines.dynamo_passes.traced_graph import TracedGraph
from lora_export.onnx_export.engines.isolated import Worker
from lora_export.onnx_export.weights import map as weights_map
from lora_export.progress import Silent
from lora_export.workflows.pipelines.exporting import export_pipeline_folder
from lora_export.workflows.proving import prover
from tests.diffusion.conftest import Bases


class InProcess(Worker):
    """Runs engines and proofs in this process, which has imported torch already."""

    def run(self, module: str, request: Mapping[str, Any], *, engine: str, task: str = "") -> None:
        importlib.import_module(module).main(request)


@pytest.fixture(scope="module")
def decoder(bases: Bases, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """The graph of a tiny VAE's decoder, proven."""
    output = tmp_path_factory.mktemp("decoder") / "onnx"
    options = ExportOptions(engine="diffusion", provider="cpu")
    with InProcess() as worker:
        return export(
            bases("sd15") / "vae", output, options, prove=prover("quick"), part="vae_decoder", worker=worker,
            progress=Silent(),
        )  # fmt: skip


def _axes(values: Any) -> dict[str, list[int | str]]:
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


def test_decoder_has_optimums_names_and_dynamic_sizes(decoder: ExportResult) -> None:
    graph = onnx.load(decoder.model, load_external_data=False).graph
    assert _axes(graph.input) == {"latent_sample": ["batch_size", 4, "latent_height", "latent_width"]}
    assert _axes(graph.output) == {"sample": ["batch_size", 3, "latent_height * 2", "latent_width * 2"]}
    assert (decoder.kind, decoder.engine, decoder.graphs) == ("component", "diffusion", ("model.onnx",))
    assert {"config.json", "export.json", "model.onnx_data", "weights-map.json"} <= decoder.files.keys()


def test_decoder_is_fused_and_proven(decoder: ExportResult) -> None:
    kinds = [node.op_type for node in onnx.load(decoder.model, load_external_data=False).graph.node]
    assert kinds.count("Attention") + kinds.count("MultiHeadAttention") == 1 and "Softmax" not in kinds
    assert decoder.proof is not None and decoder.proof.cases == 2 and not decoder.proof.not_reached
    assert decoder.proof.difference < decoder.proof.allowed == 1e-4


def test_decoders_map_knows_nothing_of_the_encoder(decoder: ExportResult) -> None:
    described = weights_map.read(decoder.output)
    assert described.tensors == described.hashes.keys()
    assert not [n for n in described.hashes if n.startswith(("encoder.", "quant_conv."))]


def _verdict(folder: Path, model: Path) -> dict[str, Any]:
    """The proof of a decoder's export against a folder in PyTorch."""
    from lora_export.validation.proof import process

    request = {
        "model": str(model), "export": str(folder), "graphs": ["model.onnx"], "kind": "component",
        "part": "vae_decoder", "architecture": "AutoencoderKL", "precision": "fp32", "provider": "cpu",
        "elsewhere": "", "level": "quick", "streamed_numbers": False, "far_only": False, "adapter": None,
        "result": "proof.json",
    }  # fmt: skip
    process.main(request)
    verdict: dict[str, Any] = json.loads((folder / "proof.json").read_text())
    return verdict


def test_changed_weight_in_the_data_file_fails_the_proof(
    decoder: ExportResult, bases: Bases, tmp_path: Path
) -> None:
    folder = tmp_path / "onnx"
    shutil.copytree(decoder.output, folder)
    weight = next(
        w for w in weights_map.read(folder).weights if w.name.endswith("up_blocks.1.resnets.0.conv1.weight")
    )
    data = np.memmap(folder / weight.file, np.float32, "r+", weight.offset, (weight.nbytes // 4,))
    data *= 1.02
    data.flush()
    verdict = _verdict(folder, bases("sd15") / "vae")
    assert not verdict["passed"] and float(verdict["difference"]) > 2 * float(verdict["allowed"])
    assert "up_blocks.1.resnets.0" in verdict["module"]


def changed(source: Path, target: Path, *patterns: str) -> Path:
    """A copy of a model's folder with other numbers in the weights whose names end so."""
    shutil.copytree(source, target)
    (file,) = target.glob("*.safetensors")
    tensors = load_file(file)
    names = [n for n in tensors if n.endswith(patterns)]
    assert names
    save_file(tensors | {n: tensors[n] * 1.5 + 0.01 for n in names}, file)
    return target


def test_next_adapters_decoder_takes_the_graph_and_its_own_weights(
    decoder: ExportResult, bases: Bases, tmp_path: Path
) -> None:
    model = changed(bases("sd15") / "vae", tmp_path / "vae", "up_blocks.1.resnets.0.conv1.weight", "to_q.weight")
    result = reweight(decoder.output, model, tmp_path / "onnx", progress=Silent())
    graph = (decoder.output / "model.onnx").read_bytes()
    assert (result.output / "model.onnx").read_bytes() == graph
    assert (result.output / "model.onnx_data").read_bytes() != (decoder.output / "model.onnx_data").read_bytes()
    assert _verdict(result.output, model)["passed"]
    assert not _verdict(result.output, bases("sd15") / "vae")["passed"]


def test_model_that_is_widened_while_it_runs_computes_in_fp32(
    bases: Bases, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_export.validation.proof import diffusion, reference

    folder = bases("sd15", torch.bfloat16) / "vae"
    feed = {"latent_sample": torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))}
    results = []
    for size in (0, 2**60):
        monkeypatch.setattr(reference, "fp32_bytes", lambda _, size=size: size)
        model, streamed = diffusion._load(folder, "AutoencoderKL")
        assert streamed is bool(size)
        kept = {p.dtype for p in model.parameters()}
        assert kept == ({torch.bfloat16} if streamed else {torch.float32})
        with torch.no_grad():
            results.append(diffusion._Component(model, "vae_decoder", streamed)(feed)["sample"])
        assert {p.dtype for p in model.parameters()} == kept
    assert torch.equal(*results) and results[0].dtype == torch.float32


# --- passes ------------------------------------------------------------------------------------------------


def _normalized(x: np.ndarray[Any, Any], gamma: Any, beta: Any, groups: int, epsilon: float) -> Any:
    """PyTorch's group_norm in numpy, float64, channels first."""
    apart = x.astype(np.float64).reshape(x.shape[0], groups, -1)
    apart = (apart - apart.mean(-1, keepdims=True)) / np.sqrt(apart.var(-1, keepdims=True) + epsilon)
    return apart.reshape(x.shape) * gamma[:, None, None] + beta[:, None, None]


def _group_norm_graph(silu: bool) -> tuple[ir.Model, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """NCHW → NHWC → GroupNorm → NCHW, and x · sigmoid(x) behind it."""
    random = np.random.default_rng(0)
    gamma, beta = (random.normal(size=8).astype(np.float32) for _ in range(2))
    text = f"""
        <ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
        g (float[n, 8, h, w] x) => (float[n, 8, h, w] y)
        <float[8] gamma = {{{", ".join(map(repr, map(float, gamma)))}}},
         float[8] beta = {{{", ".join(map(repr, map(float, beta)))}}}>
        {{
            last = Transpose <perm = [0, 2, 3, 1]> (x)
            made = com.microsoft.GroupNorm
                   <groups = 4, epsilon = 1e-5, activation = 0, channels_last = 1> (last, gamma, beta)
            first = Transpose <perm = [0, 3, 1, 2]> (made)
            {"z = com.microsoft.QuickGelu <alpha = 1.0> (first)" if silu else "z = Identity (first)"}
            y = Identity (z)
        }}"""
    return ir.from_proto(onnx.parser.parse_model(text)), gamma, beta


@pytest.mark.parametrize("silu", [True, False])
def test_group_norm_with_silu_computes_pytorchs(silu: bool) -> None:
    model, gamma, beta = _group_norm_graph(silu)
    group_norm.finish(TracedGraph(model, {}))
    kinds = [node.op_type for node in model.graph]
    (node,) = (n for n in model.graph if n.op_type == "GroupNorm")
    assert node.attributes["activation"].as_int() == int(silu) and "QuickGelu" not in kinds
    assert take_apart(model) == 1
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).normal(2, 3, size=(2, 8, 5, 3)).astype(np.float32)
    wanted = _normalized(x, gamma, beta, 4, 1e-5)
    wanted = wanted / (1 + np.exp(-wanted)) if silu else wanted
    found = session.run(None, {"x": x})[0]
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_group_norm_that_others_read_keeps_its_silu_apart() -> None:
    model, _, _ = _group_norm_graph(silu=True)
    first = next(n for n in model.graph if n.op_type == "Transpose" and n.attributes["perm"].as_ints()[1] == 3)
    first.outputs[0].name = "also"
    model.graph.outputs.append(first.outputs[0])
    group_norm.finish(TracedGraph(model, {}))
    assert "QuickGelu" in [node.op_type for node in model.graph]


@pytest.mark.parametrize(("positions", "kept"), [((), False), (("timestep",), True)])
def test_steps_stay_in_fp32_until_their_sine_is_known(positions: tuple[str, ...], kept: bool) -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        g (float timestep, float[2] x) => (float[2] y)
        <float[2] frequencies = {1.0, 0.5}>
        {
            angle = Mul (timestep, frequencies)
            wave = Sin (angle)
            y = Add (wave, x)
        }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    for node, name in zip(model.graph, ("angle", "wave", "y"), strict=True):
        node.outputs[0].dtype, node.outputs[0].name = ir.DataType.FLOAT, name
    halve(model, ir.DataType.FLOAT16, positions=positions)
    (wave,) = (node for node in model.graph if node.op_type == "Sin")
    computed_in = wave.inputs[0].dtype if wave.inputs[0] is not None else None
    assert computed_in == (ir.DataType.FLOAT if kept else ir.DataType.FLOAT16)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"timestep": np.array(2.5, np.float32), "x": np.zeros(2, np.float32)})[0]
    assert np.abs(found - np.sin([2.5, 1.25])).max() < 1e-3


@pytest.mark.parametrize("trained", [False, True])
def test_distances_stay_in_fp32_until_they_are_buckets(trained: bool) -> None:
    """As T5 counts them: ⌊8 · log(distance / 8) / log 16⌋. What weights take part in is no count."""
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        g (int64[n] distances) => (int64[n] buckets)
        <float factor = {2.885390082}, float eight = {8.0}>
        {
            numbers = Cast <to = 1> (distances)
            share = Div (numbers, eight)
            logarithm = Log (share)
            scaled = Mul (logarithm, factor)
            buckets = Cast <to = 7> (scaled)
        }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    for node in model.graph:
        node.outputs[0].dtype = ir.DataType.INT64 if node.outputs[0].name == "buckets" else ir.DataType.FLOAT
    if trained:
        factor = model.graph.initializers["factor"]
        factor.const_value = ir.ExternalTensor("", 0, 0, ir.DataType.FLOAT, shape=ir.Shape([]), name="factor")
    halve(model, ir.DataType.FLOAT16)
    (logarithm,) = (node for node in model.graph if node.op_type == "Log")
    assert logarithm.outputs[0].dtype == (ir.DataType.FLOAT16 if trained else ir.DataType.FLOAT)
    assert model.graph.outputs[0].dtype == ir.DataType.INT64


# --- what is refused, before any work ----------------------------------------------------------------------


def _pipeline(folder: Path, **classes: str) -> Pipeline:
    components = {n: Component(n, folder / n, "diffusers", c, {}) for n, c in classes.items()}
    return Pipeline(folder, "SomePipeline", components)


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "QwenImageTransformer2DModel", "AutoencoderKLWan"])
def test_merge_only_class_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError) as error:
        parts_of(_pipeline(tmp_path, transformer=name))
    told = error.value.message()
    assert name in told and "FluxTransformer2DModel" in told and "lora-export merge" in told


def test_parts_come_in_optimums_folders_denoiser_first(tmp_path: Path) -> None:
    found = parts_of(
        _pipeline(
            tmp_path,
            vae="AutoencoderKL",
            text_encoder_2="T5EncoderModel",
            text_encoder="CLIPTextModel",
            transformer="FluxTransformer2DModel",
        )
    )
    folders = ["transformer", "text_encoder", "text_encoder_2", "vae_encoder", "vae_decoder"]
    assert [p.folder for p in found] == folders


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (ExportOptions(precision="bf16"), "bfloat16 convolution"),
        (ExportOptions(engine="dynamo"), "--engine diffusion"),
        (ExportOptions(precision="int4", quantization=QuantizationOptions(keep=("auto",))), "--keep auto"),
        (ExportOptions(precision="int8", quantization=QuantizationOptions(activations="dynamic")), "activations"),
    ],
)
def test_option_without_a_meaning_for_pipelines_is_refused(
    options: ExportOptions, words: str, tmp_path: Path
) -> None:
    pipeline = _pipeline(tmp_path, unet="UNet2DConditionModel")
    with pytest.raises(ExportError) as error:
        pipeline_export.export_pipeline(pipeline, tmp_path / "out", options, progress=Silent())
    assert words in error.value.message() and not (tmp_path / "out").exists()


def test_missing_diffusers_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_export, "find_spec", lambda name: None)
    pipeline = _pipeline(tmp_path, unet="UNet2DConditionModel")
    with pytest.raises(RuntimeUnavailable) as error:
        pipeline_export.export_pipeline(pipeline, tmp_path / "out", ExportOptions(), progress=Silent())
    assert "pip install 'lora-export[diffusion]'" in error.value.message()


@pytest.mark.parametrize(
    ("adapters", "options"),
    [(1, ExportOptions()), (0, ExportOptions(unmerged=True)), (0, ExportOptions(shared_as="style"))],
)
def test_adapter_outside_of_a_pipeline_is_refused(adapters: int, options: ExportOptions, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        export_pipeline_folder(tmp_path, tmp_path / "out", adapters, options, Silent())


def test_half_of_an_autoencoder_leaves_out_the_other(bases: Bases) -> None:
    from lora_export.checkpoint import TensorFiles, open_checkpoint

    whole = TensorFiles(open_checkpoint(bases("sd15") / "vae").tensors)
    halves = [own_half(whole, placed({}, part)).tensors.keys() for part in ("vae_encoder", "vae_decoder")]
    assert halves[0] | halves[1] == whole.tensors.keys() and not halves[0] & halves[1]
    assert own_half(whole, placed({}, "unet")) is whole


def test_other_files_of_a_pipeline_leave_out_checker_code_and_weights(tmp_path: Path) -> None:
    """An export has these files, and `verify` asks for no others: Stable Diffusion 1.5 has a checker."""
    made = ("scheduler/scheduler_config.json", "scheduler/code.py", "tokenizer/vocab.json", "tokenizer/old.bin")
    for name in (*made, "safety_checker/config.json", "safety_checker/model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    pipeline = Pipeline(tmp_path, "StableDiffusionPipeline", {}, ("scheduler", "tokenizer", "safety_checker"))
    found = [p.relative_to(tmp_path).as_posix() for p in pipeline_export.other_files(pipeline)]
    assert found == ["model_index.json", made[0], made[2]]
    assert pipeline_export.other_files(replace(pipeline, class_name=None)) == []
