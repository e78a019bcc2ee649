"""Whole pipelines exported: Optimum's layout, its pictures beside PyTorch's, the next adapter, other precisions."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from lora_export.contracts import ExportOptions, ExportResult
from lora_export.onnx_export import check_export, load_export
from lora_export.onnx_export.weights import map as weights_map
from lora_export.progress import Silent
from lora_export.workflows.pipelines.exporting import export_pipeline_folder
from tests.consumers.environments import diffusion_python, python
from tests.diffusion.conftest import Bases
from tests.diffusion.test_export import changed as change
from tests.diffusion.tiny import PROMPT

_DENOISER = {"sd15": "unet", "sdxl": "unet", "sd3": "transformer", "flux": "transformer"}
_INPUTS = {
    "sd15": ["sample", "timestep", "encoder_hidden_states"],
    "sdxl": ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"],
    "sd3": ["hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"],
    "flux": [
        "hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "txt_ids", "img_ids",
        "guidance",
    ],
}  # fmt: skip
_TEXTS = {
    "sd15": {"text_encoder": ["last_hidden_state", "pooler_output"]},
    "sdxl": {
        "text_encoder": ["last_hidden_state", "pooler_output"],
        "text_encoder_2": ["text_embeds", "last_hidden_state"],
    },
    "sd3": {
        "text_encoder": ["text_embeds", "last_hidden_state"],
        "text_encoder_2": ["text_embeds", "last_hidden_state"],
        "text_encoder_3": ["last_hidden_state"],
    },
    "flux": {"text_encoder": ["last_hidden_state", "pooler_output"], "text_encoder_2": ["last_hidden_state"]},
}
_FUSED = {"sd15": 8, "sdxl": 24, "sd3": 2, "flux": 4}  # attentions of the denoiser
_DRAW = """
import json, os, sys, warnings
os.environ["OMP_NUM_THREADS"] = "1"
warnings.simplefilter("ignore")
import numpy as np, torch
import onnxruntime as ort
from optimum.onnxruntime import ORTDiffusionPipeline
torch.set_num_threads(1)
options = ort.SessionOptions()
options.intra_op_num_threads = 1
pipe = ORTDiffusionPipeline.from_pretrained(FOLDER, session_options=options)
pipe.set_progress_bar_config(disable=True)
made = {}
for size, rows in SIZES:
    generator = torch.Generator().manual_seed(1)
    made[f"{size}x{rows}"] = np.asarray(pipe(
        [PROMPT] * rows, num_inference_steps=4, generator=generator, height=size, width=size, output_type="np",
        **MORE
    ).images)
np.savez(OUT, **made)
print(json.dumps(type(pipe).__name__))
"""
_SIZES = ((32, 1), (48, 2))  # pixels, pictures


@pytest.fixture(scope="module", params=list(_DENOISER))
def family(request: pytest.FixtureRequest, bases: Bases, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(kind, base, its export)"""
    kind = request.param
    output = tmp_path_factory.mktemp(kind) / "onnx"
    return (
        kind,
        bases(kind),
        export_pipeline_folder(bases(kind), output, 0, ExportOptions(provider="cpu"), Silent()),
    )


@pytest.mark.slow
def test_family_has_optimums_layout_and_is_proven(family: tuple[str, Path, ExportResult]) -> None:
    kind, base, result = family
    folders = [_DENOISER[kind], *_TEXTS[kind], "vae_encoder", "vae_decoder"]
    assert result.kind == "pipeline" and result.graphs == tuple(f"{folder}/model.onnx" for folder in folders)
    assert load_export(result.output) == result
    check_export(result.output, result.graphs)
    for folder in folders:
        graph = onnx.load(result.output / folder / "model.onnx", load_external_data=False).graph
        outputs = [o.name for o in graph.output]
        if folder == _DENOISER[kind]:
            assert [i.name for i in graph.input] == _INPUTS[kind]
            assert outputs == (["out_sample"] if folder == "unet" else ["out_hidden_states"])
            assert [n.op_type for n in graph.node].count("MultiHeadAttention") == _FUSED[kind]
        if folder in _TEXTS[kind]:
            own = _TEXTS[kind][folder]
            assert outputs[: len(own)] == own
            states = [] if own == ["last_hidden_state"] else [f"hidden_states.{i}" for i in range(3)]
            assert outputs[len(own) :] == states
        one = load_export(result.output / folder)
        assert one.kind == "component" and one.proof is not None and not one.tried
    assert result.proof is not None and result.proof.difference <= result.proof.allowed
    for path in [base / "model_index.json", *base.glob("scheduler/*"), *base.glob("tokenizer*/*")]:
        assert (result.output / path.relative_to(base)).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_family_draws_in_optimum_what_pytorch_draws(family: tuple[str, Path, ExportResult], tmp_path: Path) -> None:
    import torch
    from diffusers import DiffusionPipeline

    kind, base, result = family
    more: dict[str, Any] = {"guidance_scale": 3.5 if kind == "flux" else 5.0}
    more |= {"max_sequence_length": 48} if kind in ("sd3", "flux") else {}
    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    folder = _readable_by_transformers_4(result.output, tmp_path / "pipeline")
    code = _DRAW
    for name, value in {
        "FOLDER": str(folder), "OUT": str(tmp_path / "drawn.npz"), "SIZES": _SIZES, "PROMPT": PROMPT, "MORE": more,
    }.items():  # fmt: skip
        code = code.replace(name, repr(value))
    cls = python(diffusion_python(), code)
    assert cls.startswith("ORT") and cls.endswith("Pipeline")
    drawn = np.load(tmp_path / "drawn.npz")
    for size, rows in _SIZES:
        generator = torch.Generator().manual_seed(1)
        wanted = pipe(
            [PROMPT] * rows, num_inference_steps=4, generator=generator, height=size, width=size, output_type="np",
            **more,
        ).images  # fmt: skip
        error = float(((wanted - drawn[f"{size}x{rows}"]) ** 2).mean())
        assert wanted.std() > 0.01 and 10 * np.log10(1 / max(error, 1e-30)) >= 60


def _readable_by_transformers_4(source: Path, target: Path) -> Path:
    """The tokenizers of the tiny pipelines are transformers 5's, which 4 does not read."""
    shutil.copytree(source, target)
    index = json.loads((target / "model_index.json").read_text())
    for name, told in index.items():
        if told == ["transformers", "T5Tokenizer"]:
            index[name] = ["transformers", "T5TokenizerFast"]
    (target / "model_index.json").write_text(json.dumps(index))
    for file in target.glob("tokenizer*/tokenizer_config.json"):
        settings = json.loads(file.read_text())
        kept = {k: v for k, v in settings.items() if k not in ("extra_special_tokens", "backend")}
        file.write_text(json.dumps(kept))
    return target


@pytest.mark.slow
def test_next_adapter_by_graph_from_is_byte_equal_to_a_fresh_export(bases: Bases, tmp_path: Path) -> None:
    base, changed = bases("sd15"), tmp_path / "merged"
    shutil.copytree(base, changed)
    shutil.rmtree(changed / "unet")
    change(base / "unet", changed / "unet", "attn2.to_q.weight", "conv_in.bias")
    shutil.rmtree(changed / "vae")
    change(base / "vae", changed / "vae", "decoder.conv_out.weight")
    first = export_pipeline_folder(base, tmp_path / "first", 0, ExportOptions(provider="cpu"), Silent())
    options = ExportOptions(provider="cpu", graph_from=first.output)
    second = export_pipeline_folder(changed, tmp_path / "second", 0, options, Silent())
    fresh = export_pipeline_folder(changed, tmp_path / "fresh", 0, ExportOptions(provider="cpu"), Silent())
    assert second.files.keys() == fresh.files.keys()
    same = [n for n in fresh.files if (fresh.output / n).read_bytes() == (second.output / n).read_bytes()]
    assert {n for n in fresh.files if n not in same} == {n for n in fresh.files if n.endswith("export.json")}
    equal = [n for n in fresh.files if (fresh.output / n).read_bytes() == (first.output / n).read_bytes()]
    assert {n for n in fresh.files if n not in equal and not n.endswith("export.json")} == {
        "unet/model.onnx_data", "unet/weights-map.json", "vae_decoder/model.onnx_data",
        "vae_decoder/weights-map.json",
    }  # fmt: skip
    assert second.proof is not None and second.proof.inherited


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "provider", "kinds"),
    [
        ("fp16", "cpu", {"Cast": 5}),
        ("int8", "cpu", {"MatMulNBits": 50}),
        ("int4", "cpu", {"MatMulNBits": 50}),
        ("fp16", "cuda", {"GroupNorm": 21, "InstanceNormalization": 0}),
    ],
)
def test_unet_in_another_precision_is_proven(
    precision: Any, provider: Any, kinds: dict[str, int], bases: Bases, tmp_path: Path
) -> None:
    options = ExportOptions(precision=precision, provider=provider)
    result = export_pipeline_folder(bases("sd15") / "unet", tmp_path / "onnx", 0, options, Silent())
    assert result.graphs == ("model.onnx",) and result.proof is not None and not result.tried
    found = [n.op_type for n in onnx.load(result.model, load_external_data=False).graph.node]
    assert {kind: found.count(kind) for kind in kinds} == kinds


@pytest.mark.slow
def test_vae_that_says_force_upcast_stays_in_fp32(bases: Bases, tmp_path: Path) -> None:
    options = ExportOptions(precision="fp16", provider="cpu")
    result = export_pipeline_folder(bases("sd15") / "vae", tmp_path / "onnx", 0, options, Silent())
    record = json.loads((result.output / "export.json").read_text())
    assert record["kind"] == "pipeline" and result.graphs == ("vae_encoder/model.onnx", "vae_decoder/model.onnx")
    for part in ("vae_encoder", "vae_decoder"):
        assert record["components"][part]["precision"] == "fp32"
        assert "force_upcast" in record["components"][part]["note"]
        assert {w.dtype for w in weights_map.read(result.output / part).weights} == {"float32"}
