"""A pipeline merged as a whole: what is written, what is left out, and what verification finds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from lora_export import merge, verify
from lora_export.commands.main import cli
from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.errors import InputError, LoraExportError
from lora_export.merging.certificate.document import NAME
from lora_export.storage.sealed import read_sealed, write_sealed

UNET, ENCODER = "down_blocks.0.attn.to_q", "text_model.encoder.layers.0.self_attn.q_proj"


def model(folder: Path, tensors: dict[str, torch.Tensor], name: str, **config: Any) -> None:
    folder.mkdir(parents=True)
    save_file(tensors, folder / name)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A pipeline of a UNet, a text encoder and a VAE, with files that belong to none of them."""
    folder = tmp_path / "base"
    unet = {f"{UNET}.weight": torch.eye(6), "conv_out.bias": torch.ones(4)}
    name = "diffusion_pytorch_model.safetensors"
    model(folder / "unet", unet, name, _class_name="UNet2DConditionModel")
    model(folder / "vae", {"decoder.conv_in.bias": torch.ones(3)}, name, _class_name="AutoencoderKL")
    save_file({"decoder.conv_in.bias": torch.ones(3).half()}, folder / "vae" / name.replace(".", ".fp16.", 1))
    clip = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
    model(folder / "text_encoder", {f"{ENCODER}.weight": torch.eye(4)}, "model.safetensors", **clip)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "scheduler" / "code.py").write_text("raise SystemExit")
    (folder / "README.md").write_text("# A base")
    save_file({"whole": torch.ones(1)}, folder / "sd-v1.safetensors")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def spelled(prefix: str, module: str, size: int, seed: int, alpha: float = 2.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    name = prefix + module.replace(".", "_")
    return {
        f"{name}.lora_down.weight": torch.randn(2, size, generator=generator),
        f"{name}.lora_up.weight": torch.randn(size, 2, generator=generator),
        f"{name}.alpha": torch.tensor(alpha),
    }


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    tensors = spelled("lora_unet_", UNET, 6, 1) | spelled("lora_te_", ENCODER, 4, 2)
    save_file(tensors, tmp_path / "style.safetensors", metadata={"ss_base_model_version": "sd_v1"})
    return tmp_path / "style.safetensors"


def delta(file: Path, prefix: str, module: str) -> torch.Tensor:
    tensors, name = load_file(file), prefix + module.replace(".", "_")
    return (tensors[f"{name}.lora_up.weight"].double() @ tensors[f"{name}.lora_down.weight"].double()) * (
        float(tensors[f"{name}.alpha"]) / 2
    )


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_pipeline_merge_writes_components_and_copies_the_rest(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = merge(base, [(adapter, 0.5)], out)
    certificate = "lora_export_certificate.json"
    left = {"sd-v1.safetensors", "onnx/model.onnx", "scheduler/code.py"}
    left.add("vae/diffusion_pytorch_model.fp16.safetensors")
    made = {certificate, f"unet/{certificate}", f"text_encoder/{certificate}"}
    assert files(out) == files(base) - left | made
    for name in files(base) - left:
        if not name.startswith(("unet/diffusion", "text_encoder/model")):
            assert (out / name).read_bytes() == (base / name).read_bytes()
    unet = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(unet[f"{UNET}.weight"], (torch.eye(6) + 0.5 * delta(adapter, "lora_unet_", UNET)).float())
    encoder = load_file(out / "text_encoder" / "model.safetensors")
    expected = torch.eye(4) + 0.5 * delta(adapter, "lora_te_", ENCODER)
    assert torch.equal(encoder[f"{ENCODER}.weight"], expected.float())
    assert {n: c.tensors["updated"] for n, c in result.components.items()} == {"text_encoder": 1, "unet": 1}
    assert result.adapter_tensors == {"used": 6, "total": 6}
    assert any("sd-v1.safetensors" in w for w in result.warnings)
    assert [c.outcome for c in result.base_checks if c.name == "architecture"] == ["agrees"]
    assert verify(out, base, [(adapter, 0.5)]).verified


def test_pipeline_merge_of_two_adapters_adds_both(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file(spelled("lora_unet_", UNET, 6, 3, alpha=1.0), other)
    merge(base, [(adapter, 0.5), (other, 2.0)], tmp_path / "out")
    deltas = 0.5 * delta(adapter, "lora_unet_", UNET) + 2 * delta(other, "lora_unet_", UNET)
    merged = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")[f"{UNET}.weight"]
    torch.testing.assert_close(merged.double(), torch.eye(6).double() + deltas, atol=2e-7, rtol=2e-7)
    choices = [AdapterChoice(adapter, 0.5), AdapterChoice(other, 2.0)]
    assert verify(tmp_path / "out", base, choices).verified
    assert not verify(tmp_path / "out", base, choices[::-1]).verified


def test_pipeline_merge_skips_a_component_and_says_so(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = merge(base, adapter, out, MergeOptions(skip=("text_encoder",)))
    encoder = "text_encoder/model.safetensors"
    assert (out / encoder).read_bytes() == (base / encoder).read_bytes()
    assert json.loads((out / "lora_export_certificate.json").read_text())["skipped"] == ["text_encoder"]
    assert any("text_encoder stays unmerged" in w for w in result.warnings)
    assert verify(out, base, adapter).verified
    with pytest.raises(InputError, match="no such component"):
        merge(base, adapter, tmp_path / "other", MergeOptions(skip=("text_encoder_2",)))
    with pytest.raises(InputError, match="changes nothing else"):
        merge(base, adapter, tmp_path / "other", MergeOptions(skip=("text_encoder", "unet")))


def test_pipeline_merge_reads_and_writes_a_variant(base: Path, adapter: Path, tmp_path: Path) -> None:
    half = {n: t.half() for n, t in load_file(base / "unet" / "diffusion_pytorch_model.safetensors").items()}
    save_file(half, base / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    out = tmp_path / "out"
    merge(base, adapter, out, MergeOptions(variant="fp16"))
    names = {n for n in files(out) if n.endswith(".safetensors") and not n.startswith("text_encoder")}
    assert names == {f"{part}/diffusion_pytorch_model.fp16.safetensors" for part in ("unet", "vae")}
    merged = load_file(out / "unet" / "diffusion_pytorch_model.fp16.safetensors")[f"{UNET}.weight"]
    assert merged.dtype == torch.float16
    assert verify(out, base, adapter).verified
    with pytest.raises(InputError, match="variant bf16"):
        merge(base, adapter, tmp_path / "other", MergeOptions(variant="bf16"))


def test_pipeline_merge_into_a_model_alone(base: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "unet-style.safetensors", tmp_path / "out"
    save_file(spelled("lora_unet_", UNET, 6, 1), file)
    result = merge(base / "unet", file, out)
    assert list(result.components) == ["unet"] and "model_index.json" not in files(out)
    assert verify(out, base / "unet", file).verified
    merge(base, file, tmp_path / "whole")
    name = "diffusion_pytorch_model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "whole" / "unet" / name).read_bytes()


def test_pipeline_merge_refused_leaves_nothing(base: Path, adapter: Path, tmp_path: Path) -> None:
    before = {p.name for p in tmp_path.iterdir()}
    tensors = load_file(adapter) | spelled("lora_unet_", "down_blocks.9.attn.to_q", 6, 1)
    save_file(tensors, adapter)
    with pytest.raises(LoraExportError) as caught:
        merge(base, adapter, tmp_path / "out")
    assert str(caught.value.tensor).startswith("lora_unet_down_blocks_9_attn_to_q")
    assert {p.name for p in tmp_path.iterdir()} == before
    with pytest.raises(InputError, match="nothing to merge"):
        merge(base, [], tmp_path / "out")


def test_pipeline_merge_warns_of_another_architecture(base: Path, adapter: Path, tmp_path: Path) -> None:
    save_file(load_file(adapter), adapter, metadata={"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"})
    checks = merge(base, adapter, tmp_path / "out").base_checks
    assert [c.outcome for c in checks if c.name == "architecture"] == ["differs"]


def test_pipeline_merge_dry_run_and_words(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["merge", "-b", str(base), "-a", str(adapter), "-o", str(out)]
    told = json.loads(CliRunner().invoke(cli, [*words, "--dry-run", "--json"]).stdout)
    assert not out.exists() and told["formats"] == ["kohya"] and set(told["components"]) == {"unet", "text_encoder"}
    assert "copied as they are  vae" in CliRunner().invoke(cli, [*words, "--dry-run"]).stdout
    printed = CliRunner().invoke(cli, words).stdout
    assert "unet" in printed and "1 updated (1 × lora), 1 copied, 100.00% after rounding" in printed


def _edited(name: str, edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(edit((folder / name).read_bytes())) and None


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (_edited("vae/diffusion_pytorch_model.safetensors", lambda b: b[:-1] + b"\x01"), "files"),
        (_edited("unet/diffusion_pytorch_model.safetensors", lambda b: b[:-1] + b"\x01"), "unet: output_hashes"),
        (_edited("scheduler/scheduler_config.json", lambda b: b'{"beta": 1}'), "files"),
        (lambda f: (f / "vae" / "config.json").unlink(), "files"),
        (lambda f: (f / "vae" / "code.py").write_text(""), "files"),
        (_edited("lora_export_certificate.json", lambda b: b.replace(b"kohya", b"peft!")), "certificate"),
        (lambda f: (f / "unet" / "lora_export_certificate.json").unlink(), "files"),
    ],
)
def test_pipeline_verify_finds_what_was_changed(
    base: Path, adapter: Path, tmp_path: Path, change: Callable[[Path], None], found: str
) -> None:
    out = tmp_path / "out"
    merge(base, adapter, out)
    assert verify(out).verified
    change(out)
    assert found in {c.name for c in verify(out).checks if not c.passed}
    assert not verify(out, base, adapter).verified


def test_pipeline_verify_finds_another_base_and_another_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(base, adapter, out)
    file = base / "vae" / "diffusion_pytorch_model.safetensors"
    kept = file.read_bytes()
    save_file({"decoder.conv_in.bias": torch.zeros(3)}, file)
    assert "copied_files" in {c.name for c in verify(out, base, adapter).checks if not c.passed}
    file.write_bytes(kept)
    assert verify(out, base, adapter).verified
    save_file(load_file(adapter) | spelled("lora_unet_", UNET, 6, 9), adapter)
    assert "pipeline" in {c.name for c in verify(out, base, adapter).checks if not c.passed}


def test_pipeline_merged_on_another_device_is_verified_on_the_cpu(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    """No byte depends on the device, which is all that the certificates of such a merge say otherwise."""
    out = tmp_path / "out"
    merge(base, adapter, out)
    path = out / NAME
    document = {k: v for k, v in read_sealed(path).items() if k != "digest"}
    document["options"]["device"] = "cuda"
    write_sealed(path, document)
    assert verify(out, base, adapter).verified
