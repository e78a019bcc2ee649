"""Adapter files for the tiny pipelines, in each naming, with the exact weights that a merge must give."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tests.diffusion.oracle import KINDS, Draw, Trained
from tests.diffusion.spellings import (
    DOTTED_ENDINGS,
    KOHYA_ENDINGS,
    LINEAR_ENDINGS,
    PEFT_ENDINGS,
    Site,
    flux_sites,
    old_sites,
    sd3_sites,
    sgm_sites,
    text_sites,
    unet_sites,
    xlabs_sites,
)

Family = Literal["sd15", "sdxl", "sd3", "flux"]
Weights = dict[str, dict[str, Tensor]]
DENOISER = {"sd15": "unet", "sdxl": "unet", "sd3": "transformer", "flux": "transformer"}
CLIPS = {
    "sd15": ("text_encoder",),
    "sdxl": ("text_encoder", "text_encoder_2"),
    "sd3": ("text_encoder", "text_encoder_2"),
    "flux": ("text_encoder",),
}
T5 = {"sd3": "text_encoder_3", "flux": "text_encoder_2"}
_ORIGINAL = {"sd15": sgm_sites, "sdxl": sgm_sites, "sd3": sd3_sites, "flux": flux_sites}


@dataclass(frozen=True)
class Naming:
    """How a trainer names what it saves.

    denoiser: prefix of its modules; texts: prefixes of the text encoders, by component; sites: of the denoiser;
    flat: dots become underscores; alpha: where it is said; endings: part → ending.
    """

    denoiser: str
    texts: Callable[[Family], Mapping[str, str]]
    sites: Callable[[Family], Callable[[Any], Iterator[Site]]]
    flat: bool
    endings: Mapping[str, str]
    alpha: Literal["tensor", "metadata", "plain metadata", "one", "config", "none"]
    text_endings: Mapping[str, str] | None = None


def _diffusers(_family: Family) -> Callable[[Any], Iterator[Site]]:
    return unet_sites


def _kohya_texts(family: Family) -> dict[str, str]:
    if family == "sd15":
        return {"text_encoder": "lora_te_"}
    numbered = {c: f"lora_te{i}_" for i, c in enumerate(CLIPS[family], 1)}
    return numbered | ({T5[family]: "lora_te3_"} if family in T5 else {})


def _onetrainer_texts(family: Family) -> dict[str, str]:
    """FLUX's T5 is the second text encoder here, the third in sd-scripts."""
    return _kohya_texts(family) | ({"text_encoder_2": "lora_te2_"} if family == "flux" else {})


def _own_texts(family: Family) -> dict[str, str]:
    return {c: f"{c}." for c in (*CLIPS[family], *([T5[family]] if family in T5 else []))}


def _comfy_texts(family: Family) -> dict[str, str]:
    found = {
        c: f"text_encoders.{n}.transformer." for c, n in zip(CLIPS[family], ("clip_l", "clip_g"), strict=False)
    }
    return found | ({T5[family]: "text_encoders.t5xxl.transformer."} if family in T5 else {})


def _oft_texts(family: Family) -> dict[str, str]:
    return {"text_encoder": "oft_te_"} if family == "sd15" else {}


def _none(_family: Family) -> dict[str, str]:
    return {}


def _trained_with(family: Family) -> Callable[[Any], Iterator[Site]]:
    """sd-scripts holds SD 1's UNet in diffusers' form, and all others in their original one."""
    return unet_sites if family == "sd15" else _ORIGINAL[family]


_KOHYA = Naming("lora_unet_", _kohya_texts, _trained_with, True, KOHYA_ENDINGS, "tensor")
_DIFFUSERS = Naming("{component}.", _own_texts, _diffusers, False, PEFT_ENDINGS, "metadata")
_ORIGINAL_PEFT = Naming("diffusion_model.", _none, lambda f: _ORIGINAL[f], False, PEFT_ENDINGS, "none")
NAMINGS: dict[str, Naming] = {
    "kohya": _KOHYA,
    "kohya_original": replace(_KOHYA, sites=lambda f: _ORIGINAL[f]),
    "kohya_diffusers": replace(_KOHYA, sites=_diffusers),
    "diffusers": _DIFFUSERS,
    "diffusers_without_metadata": replace(_DIFFUSERS, alpha="none"),
    "diffusers_without_prefix": replace(_DIFFUSERS, denoiser="", texts=_none, alpha="none"),
    "diffusers_old": Naming(
        "{component}.", _own_texts, lambda f: old_sites, False, KOHYA_ENDINGS, "none", LINEAR_ENDINGS
    ),
    "diffusers_dotted": replace(_DIFFUSERS, endings=DOTTED_ENDINGS, text_endings=LINEAR_ENDINGS, alpha="none"),
    "peft": replace(_DIFFUSERS, denoiser="base_model.model.", texts=_none, alpha="config"),
    "peft_alpha": replace(_DIFFUSERS, alpha="tensor"),
    "base_model": replace(_DIFFUSERS, denoiser="base_model.model.", texts=_none, alpha="none"),
    "aitoolkit": _ORIGINAL_PEFT,
    "aitoolkit_alpha": replace(_ORIGINAL_PEFT, alpha="tensor"),
    "comfy": Naming("diffusion_model.", _comfy_texts, lambda f: _ORIGINAL[f], False, KOHYA_ENDINGS, "tensor"),
    "comfy_diffusers": Naming("diffusion_model.", _comfy_texts, _diffusers, False, PEFT_ENDINGS, "tensor"),
    "onetrainer": Naming("lora_transformer_", _onetrainer_texts, _diffusers, True, KOHYA_ENDINGS, "tensor"),
    "simpletuner": replace(_DIFFUSERS, alpha="plain metadata"),
    "lycoris": Naming("lycoris_", _none, _diffusers, True, KOHYA_ENDINGS, "tensor"),
    "xlabs": Naming("", _none, lambda f: xlabs_sites, False, KOHYA_ENDINGS, "none"),
    "bfl": replace(_ORIGINAL_PEFT, denoiser="", endings={**PEFT_ENDINGS, "set_weight": ".scale"}),
    "alpha_in_metadata": replace(_DIFFUSERS, texts=_none, alpha="one"),
    "oft": replace(
        _KOHYA, denoiser="oft_unet_", texts=lambda f: {"text_encoder": "oft_te_"} if f == "sd15" else {}
    ),
}


@dataclass(frozen=True)
class Made:
    """path: the file, or a PEFT folder; expected: component → tensor → exact weight (float64), where the adapter
    changes one or trained one to no effect; modules: trained; tensors: in the file; kinds: modules of each."""

    path: Path
    expected: Weights
    modules: int
    tensors: int
    kinds: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What to train. kinds: taken in turn, those that fit; ranks, alphas: in turn; every: nth module alone; zeros:
    every nth module is trained to nothing; only: components; where: a part of the module's name in the base."""

    kinds: Sequence[str] = ("lora",)
    ranks: Sequence[int] = (4,)
    alphas: Sequence[float | None] = (2.0,)
    every: int = 1
    zeros: int = 0
    only: Sequence[str] | None = None
    where: str = ""
    dtype: torch.dtype = torch.float32
    seed: int = 0
    strength: float = 1.0
    metadata: Mapping[str, str] = field(default_factory=dict)


def base_weights(folder: Path) -> Weights:
    """component → tensor → value in float64, of a pipeline's models."""
    found: Weights = {}
    for file in sorted(folder.glob("*/*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name).double() for name in opened.keys()}  # noqa: SIM118
        found.setdefault(file.parent.name, {}).update(tensors)
    return found


def make(path: Path, base: Path, family: Family, naming: str = "kohya", plan: Plan | None = None) -> Made:
    """An adapter of the pipeline `base` in the file (or, for "peft", the folder) `path`."""
    plan, how, weights = plan or Plan(), NAMINGS[naming], base_weights(base)
    generator = torch.Generator().manual_seed(plan.seed)
    tensors: dict[str, Tensor] = {}
    expected: Weights = {}
    counts: dict[str, int] = {}
    sizes: dict[tuple[str, str], tuple[int, float | None]] = {}
    turn = 0
    for i, (site, spelled) in enumerate(_sites(family, how, weights, plan)):
        kind = _kind(plan, i, weights[site.component], site)
        if kind is None or i % plan.every:
            continue
        rank, alpha = plan.ranks[turn % len(plan.ranks)], plan.alphas[turn % len(plan.alphas)]
        alpha = None if how.alpha == "none" else plan.alphas[0] if how.alpha == "one" else alpha
        draw = Draw(generator, plan.dtype, rank, alpha, how.alpha == "tensor", plan.strength)
        whole, bias = _trained_weight(weights[site.component], site)
        made = KINDS[kind].make(whole, bias, draw)
        _put(expected.setdefault(site.component, {}), weights[site.component], site, made)
        endings = site.endings or (how.text_endings if site.component != DENOISER[family] else None) or how.endings
        for part, value in made.parts.items():
            tensors[spelled + endings.get(part, f".{part}")] = value
        if alpha is not None and how.alpha == "tensor" and made.has_alpha:
            tensors[f"{spelled}.alpha"] = torch.tensor(alpha, dtype=plan.dtype)
        sizes[site.component, site.targets[0]] = rank, alpha
        counts[kind] = counts.get(kind, 0) + 1
        turn += 1
    assert turn, "no module was trained"
    metadata = dict(plan.metadata) | _metadata(how, sizes, plan, counts)
    _write(path, tensors, metadata, how, sizes, counts)
    return Made(path, expected, turn, len(tensors), counts)


def _sites(family: Family, how: Naming, weights: Weights, plan: Plan) -> Iterator[tuple[Site, str]]:
    """Each module that the naming can say, with its name in the file up to the ending."""
    denoiser, texts = DENOISER[family], how.texts(family)
    prefix = how.denoiser.format(component=denoiser)
    modules = {c: sorted(n.removesuffix(".weight") for n in w if n.endswith(".weight")) for c, w in weights.items()}
    found = [(replace(s, component=denoiser), prefix) for s in how.sites(family)(modules[denoiser])]
    for component, text_prefix in texts.items():
        sites = text_sites(modules[component], clip=component in CLIPS[family])
        found += [(replace(s, component=component), text_prefix) for s in sites if "embed" not in s.spelled]
    for site, start in found:
        asked = (plan.only is None or site.component in plan.only) and plan.where in site.targets[0]
        if asked and "relative_attention_bias" not in site.spelled and site.spelled != "shared":
            yield site, start + (site.spelled.replace(".", "_") if how.flat else site.spelled)


def _kind(plan: Plan, turn: int, weights: Mapping[str, Tensor], site: Site) -> str | None:
    if plan.zeros and turn % plan.zeros == 0 and weights[f"{site.targets[0]}.weight"].dim() > 1:
        return "zero"
    shape = _trained_weight(weights, site)[0].shape
    fitting = [k for k in plan.kinds if KINDS[k].takes(shape)]
    return fitting[turn % len(fitting)] if fitting else None


def _trained_weight(weights: Mapping[str, Tensor], site: Site) -> tuple[Tensor, Tensor | None]:
    """The weight and bias that the trainer saw: rows of the base below each other, halves in its own order."""
    weight = torch.cat([weights[f"{t}.weight"] for t in site.targets])
    has_bias = all(f"{t}.bias" in weights for t in site.targets)
    bias = torch.cat([weights[f"{t}.bias"] for t in site.targets]) if has_bias else None
    return _swapped(weight, site), None if bias is None else _swapped(bias, site)


def _swapped(value: Tensor, site: Site) -> Tensor:
    return value.roll(value.shape[0] // 2, 0) if site.swap else value


def _put(expected: dict[str, Tensor], weights: Mapping[str, Tensor], site: Site, made: Trained) -> None:
    for ending, value in (("weight", made.weight), ("bias", made.bias)):
        if value is None:
            continue
        heights = [weights[f"{t}.{ending}"].shape[0] for t in site.targets]
        for target, rows in zip(site.targets, _swapped(value, site).split(heights), strict=True):
            assert f"{target}.{ending}" not in expected, f"{target} is trained twice"
            expected[f"{target}.{ending}"] = rows


def _metadata(
    how: Naming, sizes: Mapping[tuple[str, str], tuple[int, float | None]], plan: Plan, kinds: Mapping[str, int]
) -> dict[str, str]:
    first = next(iter(sizes.values()))
    if how.alpha == "one":
        return {"alpha": str(plan.alphas[0])}
    if how.alpha == "plain metadata":
        assert len(set(sizes.values())) == 1, "these keys say one rank and one alpha"
        components = {c for c, _ in sizes}
        told = {f"{c}.r": str(first[0]) for c in components} | {
            f"{c}.lora_alpha": str(first[1]) for c in components
        }
        return {"format": "pt", **told}
    if how.alpha == "metadata":
        configs: dict[str, Any] = {}
        for component in {c for c, _ in sizes}:
            own = {t: s for (c, t), s in sizes.items() if c == component}
            config = _config(own, "dora_peft" in kinds)
            configs |= {f"{component}.{key}": value for key, value in config.items()}
        return {"format": "pt", "lora_adapter_metadata": json.dumps(configs, indent=2)}
    return {"format": "pt"}


def _config(sizes: Mapping[str, tuple[int, float | None]], dora: bool) -> dict[str, Any]:
    """PEFT's LoraConfig of one component: an alpha that is not said is the rank.

    Patterns are matched at the ends of names, the first that fits: so each module is listed, long names first.
    """
    rank, alpha = next(iter(sizes.values()))
    known = {t: (r, r if a is None else a) for t, (r, a) in sorted(sizes.items(), key=lambda s: -len(s[0]))}
    mixed = len(set(known.values())) > 1
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank if alpha is None else alpha,
        "target_modules": sorted(sizes),
        "rank_pattern": {t: r for t, (r, _) in known.items()} if mixed else {},
        "alpha_pattern": {t: a for t, (_, a) in known.items()} if mixed else {},
        "use_dora": dora,
        "bias": "none",
        "fan_in_fan_out": False,
    }


def _write(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    how: Naming,
    sizes: Mapping[tuple[str, str], tuple[int, float | None]],
    kinds: Mapping[str, int],
) -> None:
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    if how.alpha != "config":
        save_file(contiguous, path, metadata=dict(metadata))
        return
    path.mkdir(parents=True, exist_ok=True)
    save_file(contiguous, path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = _config({t: s for (_, t), s in sizes.items()}, "dora_peft" in kinds)
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2))
