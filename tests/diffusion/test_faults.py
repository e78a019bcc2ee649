"""Deliberate faults in merged pipelines, as tools that merge image adapters make them: `validate` catches each."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_export.api import merge
from lora_export.contracts import AdapterChoice
from tests.diffusion.conftest import Bases
from tests.diffusion.files import Family, Plan, make
from tests.diffusion.test_formats import rounded
from tests.failures.commands import invoke

pytestmark = pytest.mark.slow
MODULES: dict[Family, Plan] = {
    "sd15": Plan(kinds=("lora", "tucker"), ranks=(4, 8), alphas=(2.0, 1.0)),
    "sdxl": Plan(ranks=(4, 8), alphas=(2.0, 1.0)),
    "flux": Plan(ranks=(4, 8), alphas=(2.0, 1.0)),
}
CONV = "down_blocks.0.resnets.0.conv1.weight"


@dataclass
class Scene:
    """A pipeline in bf16, an adapter, and what an honest merge made of them; `merged` may be changed."""

    base: Path
    adapter: Path
    merged: Path

    def weights(self, component: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(of the base, of the merged one), float64."""
        (name,) = (p.name for p in (self.base / component).glob("*.safetensors"))
        found = [load_file(folder / component / name) for folder in (self.base, self.merged)]
        return {n: t.double() for n, t in found[0].items()}, {n: t.double() for n, t in found[1].items()}

    def change(self, component: str, values: dict[str, Tensor]) -> None:
        """Weights of the merged component in place of its own, rounded once."""
        (path,) = (self.merged / component).glob("*.safetensors")
        with safe_open(path, "pt") as opened:
            metadata = opened.metadata()
        stored = load_file(path)
        changed = {n: rounded(v, stored[n].dtype) for n, v in values.items()}
        assert any(not torch.equal(stored[n], v) for n, v in changed.items()), "no fault"
        save_file({**stored, **changed}, path, metadata=metadata)


def scale_twice(scene: Scene) -> None:
    base, merged = scene.weights("unet")
    scene.change("unet", {n: base[n] + 0.5 * (merged[n] - base[n]) for n in base if "attn" in n})


def second_encoder_lost(scene: Scene) -> None:
    scene.change("text_encoder_2", scene.weights("text_encoder_2")[0])


def q_and_k_swapped(scene: Scene) -> None:
    base, merged = scene.weights("transformer")
    q, k = (f"transformer_blocks.0.attn.to_{x}.weight" for x in "qk")
    scene.change("transformer", {q: base[q] + merged[k] - base[k], k: base[k] + merged[q] - base[q]})


def halves_unswapped(scene: Scene) -> None:
    base, merged = scene.weights("transformer")
    name = "norm_out.linear.weight"
    delta = merged[name] - base[name]
    scene.change("transformer", {name: base[name] + delta.roll(len(delta) // 2, 0)})


def mid_ignored(scene: Scene) -> None:
    """up · down, which are 1 × 1, at the middle of the kernel."""
    base, _ = scene.weights("unet")
    stored, start = load_file(scene.adapter), f"lora_unet_{CONV.removesuffix('.weight').replace('.', '_')}"
    assert f"{start}.lora_mid.weight" in stored
    down, up = (stored[f"{start}.lora_{x}.weight"].double().flatten(1) for x in ("down", "up"))
    value = base[CONV].clone()
    value[:, :, 1, 1] += up @ down * (float(stored[f"{start}.alpha"]) / len(down))
    scene.change("unet", {CONV: value})


def one_block_stronger(scene: Scene) -> None:
    base, merged = scene.weights("unet")
    names = [n for n in base if n.startswith("mid_block.attentions.0.transformer_blocks")]
    scene.change("unet", {n: base[n] + 1.02 * (merged[n] - base[n]) for n in names})


def convolution_transposed(scene: Scene) -> None:
    base, merged = scene.weights("unet")
    name = "mid_block.attentions.0.proj_in.weight"
    assert base[name].shape[2:] == (1, 1)
    scene.change("unet", {name: base[name] + (merged[name] - base[name]).transpose(0, 1)})


def rounded_twice(scene: Scene) -> None:
    """The update rounded to bf16, then the sum, as PEFT's merge does it; in one weight alone."""
    base, _ = scene.weights("transformer")
    name, start = "proj_out.weight", "lora_unet_final_layer_linear"
    stored = load_file(scene.adapter)
    down, up = (stored[f"{start}.lora_{x}.weight"].double() for x in ("down", "up"))
    delta = up @ down * (float(stored[f"{start}.alpha"]) / len(down))
    scene.change("transformer", {name: base[name] + rounded(delta, torch.bfloat16).double()})


def vae_changed(scene: Scene) -> None:
    """The last bit of one number of the decoder."""
    _, merged = scene.weights("vae")
    name = "decoder.conv_out.weight"
    value = merged[name].clone()
    value.view(-1)[0] *= 1 + 2.0**-7
    scene.change("vae", {name: value})


def wrong_component(scene: Scene) -> None:
    """The first text encoder's update, in the second one too."""
    base, merged = scene.weights("text_encoder")
    _, second = scene.weights("text_encoder_2")
    name = "encoder.layers.0.self_attn.q_proj.weight"
    ours = {n: t for n, t in second.items() if n.endswith(name)}
    first = next(n for n in base if n.endswith(name))
    scene.change("text_encoder_2", {n: t + merged[first] - base[first] for n, t in ours.items()})


def top_level_lost(scene: Scene) -> None:
    """diffusers' loader does not find these of a kohya file."""
    base, _ = scene.weights("transformer")
    scene.change("transformer", {n: t for n, t in base.items() if n.startswith(("x_embedder", "context_embedder"))})


def t5_lost(scene: Scene) -> None:
    scene.change("text_encoder_2", scene.weights("text_encoder_2")[0])


def scheduler_changed(scene: Scene) -> None:
    path = scene.merged / "scheduler" / "scheduler_config.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, "beta_end": 0.013}))


FAULTS: dict[str, tuple[Family, Callable[[Scene], None], str]] = {
    "alpha / r twice": ("sdxl", scale_twice, "unet"),
    "second text encoder lost": ("sdxl", second_encoder_lost, "text_encoder_2"),
    "q and k swapped in a fused weight": ("flux", q_and_k_swapped, "transformer"),
    "halves unswapped": ("flux", halves_unswapped, "transformer"),
    "lora_mid ignored": ("sd15", mid_ignored, "unet"),
    "one block x 1.02": ("sd15", one_block_stronger, "unet"),
    "1 x 1 convolution transposed": ("sd15", convolution_transposed, "unet"),
    "one weight rounded twice": ("flux", rounded_twice, "transformer"),
    "one bit of the VAE": ("sdxl", vae_changed, "vae"),
    "update in the wrong component": ("sdxl", wrong_component, "text_encoder_2"),
    "top level of FLUX lost": ("flux", top_level_lost, "transformer"),
    "T5 of FLUX lost": ("flux", t5_lost, "text_encoder_2"),
    "scheduler changed": ("sd15", scheduler_changed, "pipeline_files_differ"),
}


@pytest.fixture(scope="module")
def honest(bases: Bases, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], Scene]:
    """Merged once a family."""
    made: dict[Family, Scene] = {}

    def scene(family: Family) -> Scene:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            base = bases(family, torch.bfloat16)
            adapter = make(folder / "style.safetensors", base, family, "kohya", MODULES[family]).path
            merge(base, [AdapterChoice(adapter)], folder / "merged")
            made[family] = Scene(base, adapter, folder / "merged")
        return made[family]

    return scene


def validated(scene: Scene) -> tuple[int, list[str]]:
    """Exit code, and the checks that failed."""
    done = invoke(
        "validate", "-b", scene.base, "-a", scene.adapter, "-m", scene.merged, "--json", "-q", "--size", 32,
        "--validation-seed", 1,
    )  # fmt: skip
    assert done.exit_code in (0, 3), done.output
    found = json.loads(done.stdout)
    return done.exit_code, [c["name"] for c in found["checks"] if c["passed"] is False]


@pytest.mark.parametrize("name", FAULTS)
def test_validate_of_a_faulty_merge_fails_and_names_the_component(
    name: str, honest: Callable[[Family], Scene], tmp_path: Path
) -> None:
    family, fault, named = FAULTS[name]
    good = honest(family)
    shutil.copytree(good.merged, tmp_path / "merged")
    scene = Scene(good.base, good.adapter, tmp_path / "merged")
    fault(scene)
    code, failed = validated(scene)
    assert code == 3 and failed
    assert any(check.startswith(named) for check in failed), failed
    others = {"unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"} - {named}
    blamed = {check for check in failed if check.endswith(("tensor_errors", "stored_tensors_differ"))}
    assert not {c for c in blamed for o in others if c.startswith(f"{o}_") and not c.startswith(f"{named}_")}, (
        failed
    )


@pytest.mark.parametrize("family", MODULES)
def test_validate_of_an_honest_merge_passes(family: Family, honest: Callable[[Family], Scene]) -> None:
    assert validated(honest(family)) == (0, [])
