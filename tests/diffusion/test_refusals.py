"""Broken adapter files and pipelines: refused by the name of what is wrong, with nothing written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.diffusion.broken import BROKEN, OWN_Q, Q, good, ones, pair
from tests.diffusion.conftest import Bases
from tests.failures.commands import everything, invoke


def refused(
    tmp_path: Path, base: Path, adapter: Path, *named: str, weight: float = 1.0, more: tuple[str, ...] = ()
) -> str:
    """What the command says: exit code 1, each name in its words, no traceback, and nothing new on the disk."""
    before = everything(tmp_path)
    done = invoke("merge", "-b", base, "-a", f"{adapter}:{weight}", "-o", tmp_path / "out", *more)
    assert done.exit_code == 1, done.output
    assert everything(tmp_path) == before
    said = "".join(done.output.split())  # as a terminal of any width would show it
    assert "internalerror" not in said and "Traceback" not in said, done.output
    for words in named:
        assert "".join(words.split()) in said, done.output


@pytest.mark.parametrize("name", BROKEN)
def test_merge_of_a_broken_file_is_refused_by_name(name: str, bases: Bases, tmp_path: Path) -> None:
    broken, file = BROKEN[name], good()
    broken.change(file)
    path = tmp_path / "adapter.safetensors"
    save_file({n: t.contiguous() for n, t in file.tensors.items()}, path, metadata=file.metadata)
    refused(tmp_path, bases("sd15"), path, *broken.named, weight=broken.weight, more=broken.more)


def test_merge_of_the_good_file_is_done(bases: Bases, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    save_file(good().tensors, path, metadata=good().metadata)
    done = invoke("merge", "-b", bases("sd15"), "-a", path, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output


# --- files -------------------------------------------------------------------------------------------------


def _pickle(suffix: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / f"adapter{suffix}"
        torch.save(good().tensors, path)
        return path

    return write


def _damaged(change: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "adapter.safetensors"
        save_file(good().tensors, path)
        path.write_bytes(change(path.read_bytes()))
        return path

    return write


def _two(folder: Path) -> Path:
    for name in ("one", "two"):
        save_file(good().tensors, folder / f"{name}.safetensors")
    return folder


def _overlapping(data: bytes) -> bytes:
    """The second tensor lies where the first does."""
    size = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + size])
    names = [n for n in head if n != "__metadata__" and head[n]["shape"] == [32, 2]]
    head[names[1]]["data_offsets"] = head[names[0]]["data_offsets"]
    text = json.dumps(head).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "pickle .pt": (_pickle(".pt"), "adapter.pt"),
    "pickle .ckpt": (_pickle(".ckpt"), "adapter.ckpt"),
    "pickle .bin": (_pickle(".bin"), "adapter.bin"),
    "truncated": (_damaged(lambda d: d[:-5]), "adapter.safetensors"),
    "truncated in its header": (_damaged(lambda d: d[:100]), "adapter.safetensors"),
    "longer than its header says": (_damaged(lambda d: d + b"more"), "adapter.safetensors"),
    "header that is no JSON": (_damaged(lambda d: d[:8] + b"x" + d[9:]), "adapter.safetensors"),
    "header of exabytes": (_damaged(lambda d: b"\xff" * 8 + d[8:]), "adapter.safetensors"),
    "tensors that overlap": (_damaged(_overlapping), "adapter.safetensors"),
    "no file": (lambda folder: folder / "nothing.safetensors", "nothing.safetensors"),
    "two files in a folder": (_two, "one.safetensors"),
    "empty folder": (lambda folder: folder, "adapter"),
}


@pytest.mark.parametrize("name", FILES)
def test_merge_of_a_damaged_file_is_refused_by_name(name: str, bases: Bases, tmp_path: Path) -> None:
    write, named = FILES[name]
    folder = tmp_path / "adapter"
    folder.mkdir()
    refused(tmp_path, bases("sd15"), write(folder), named)


# --- other families ----------------------------------------------------------------------------------------

BFL_CONTROL = {"img_in.lora_A.weight": ones(2, 32), "img_in.lora_B.weight": ones(64, 2)}
QKV = "lora_unet_double_blocks_0_img_attn_qkv"
LATE = "lora_unet_single_blocks_0_linear1"
JOINT = "lora_unet_joint_blocks_0_x_block_attn_qkv"
OLD, NEW = "lora_unet_input_blocks_4_1_proj_in", "lora_unet_down_blocks_1_attentions_0_proj_in"
FAMILIES = {
    "FLUX on SD3": ("sd3", pair(QKV, 192, 64), QKV),
    "SD3 on FLUX": (
        "flux",
        pair("lora_unet_joint_blocks_0_x_block_attn_qkv", 96, 32),
        "joint_blocks_0_x_block_attn_qkv",
    ),
    "SD 1.5 on SDXL": ("sdxl", pair(Q), Q),
    "SD 1.5 on FLUX": ("flux", pair(Q), Q),
    "fused qkv of two heights": ("flux", pair(QKV, 128, 64), QKV),
    "fused linear1 without its last rows": ("flux", pair(LATE, 192, 64), LATE),
    "control of Black Forest Labs": ("flux", BFL_CONTROL, "img_in"),
    "diffusers' and the original name": (
        "sdxl",
        pair("lora_unet_input_blocks_4_1_proj_in", 64, 64)
        | pair("lora_unet_down_blocks_1_attentions_0_proj_in", 64, 64),
        "down_blocks.1.attentions.0.proj_in",
    ),
    "a fused weight and a row of it": (
        "flux",
        pair(QKV, 192, 64) | pair("lora_transformer_transformer_blocks_0_attn_to_q", 64, 64),
        "transformer_blocks.0.attn.to_q",
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_merge_of_another_familys_file_is_refused_by_name(name: str, bases: Bases, tmp_path: Path) -> None:
    family, tensors, named = FAMILIES[name]
    save_file(tensors, tmp_path / "adapter.safetensors")
    refused(tmp_path, bases(family), tmp_path / "adapter.safetensors", named)


def test_merge_of_a_split_qkv_file_is_refused_unless_told(bases: Bases, tmp_path: Path) -> None:
    arguments = {"ss_network_module": "networks.lora_flux", "ss_network_args": json.dumps({"split_qkv": "True"})}
    tensors = {
        f"{QKV}.lora_down.weight": ones(6, 64),
        f"{QKV}.lora_up.weight": ones(192, 6),
        f"{QKV}.alpha": ones(1),
    }
    path = tmp_path / "adapter.safetensors"
    save_file(tensors, path, metadata=arguments)
    refused(tmp_path, bases("flux"), path, "split_qkv", "--split-qkv-alpha")
    for alpha in ("file", "trained"):
        done = invoke("merge", "-b", bases("flux"), "-a", path, "-o", tmp_path / alpha, "--split-qkv-alpha", alpha)
        assert done.exit_code == 0, done.output


# --- pipelines ---------------------------------------------------------------------------------------------


def _index(**changes: object) -> Callable[[Path], object]:
    def change(base: Path) -> None:
        told = json.loads((base / "model_index.json").read_text())
        (base / "model_index.json").write_text(json.dumps({**told, **changes}))

    return change


def _config(part: str, **changes: object) -> Callable[[Path], object]:
    def change(base: Path) -> None:
        told = json.loads((base / part / "config.json").read_text())
        (base / part / "config.json").write_text(json.dumps({**told, **changes}))

    return change


def _pickled(base: Path) -> None:
    path = base / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))


def _outside(base: Path) -> None:
    path = base / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(base.parent / "elsewhere.safetensors")
    path.symlink_to(base.parent / "elsewhere.safetensors")


PIPELINES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "class with a file": (_index(_class_name=["pipeline", "MyPipeline"]), ("model_index.json", "MyPipeline")),
    "component with a file": (_index(unet=["my_unet.py", "MyUNet"]), ("model_index.json", "my_unet.py")),
    "class of a component with a file": (_config("unet", _class_name=["unet", "MyUNet"]), ("unet/config.json",)),
    "code of a text encoder": (
        _config("text_encoder", auto_map={"AutoModel": "model.MyModel"}),
        ("text_encoder/config.json", "auto_map"),
    ),
    "path outside": (_index(**{"../outside": ["diffusers", "UNet2DConditionModel"]}), ("../outside",)),
    "absolute path": (_index(**{"/etc": ["diffusers", "UNet2DConditionModel"]}), ("/etc",)),
    "component missing": (lambda b: shutil.rmtree(b / "unet"), ("unet",)),
    "component without weights": (
        lambda b: (b / "unet" / "diffusion_pytorch_model.safetensors").unlink(),
        ("unet",),
    ),
    "pickled component": (_pickled, ("diffusion_pytorch_model",)),
    "weights outside the pipeline": (_outside, ("diffusion_pytorch_model.safetensors",)),
    "index that is no JSON": (lambda b: (b / "model_index.json").write_text("{"), ("model_index.json",)),
    "index that is a list": (lambda b: (b / "model_index.json").write_text("[]"), ("model_index.json",)),
    "component whose config is missing": (lambda b: (b / "unet" / "config.json").unlink(), ("unet",)),
    "truncated component": (
        lambda b: (b / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x10" + bytes(30)),
        ("diffusion_pytorch_model.safetensors",),
    ),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_merge_into_a_broken_pipeline_is_refused_by_name(name: str, bases: Bases, tmp_path: Path) -> None:
    change, named = PIPELINES[name]
    base = tmp_path / "base"
    shutil.copytree(bases("sd15"), base)
    change(base)
    save_file(good().tensors, tmp_path / "adapter.safetensors")
    refused(tmp_path, base, tmp_path / "adapter.safetensors", *named)


NOWHERE = "base_model.model.nowhere"
PEFT = {
    "module that the base has not": (
        {f"{NOWHERE}.lora_A.weight": ones(2, 32), f"{NOWHERE}.lora_B.weight": ones(32, 2)},
        "nowhere",
    ),
    "half a pair": ({f"base_model.model.{OWN_Q}.lora_A.weight": ones(2, 32)}, OWN_Q),
}


@pytest.mark.parametrize("name", PEFT)
def test_merge_of_a_broken_peft_folder_is_refused_by_name(name: str, bases: Bases, tmp_path: Path) -> None:
    tensors, named = PEFT[name]
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [named]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    refused(tmp_path, bases("sd15"), folder, named)


def test_refusals_are_at_least_forty() -> None:
    assert len(BROKEN) + len(FILES) + len(FAMILIES) + len(PIPELINES) + len(PEFT) >= 100
