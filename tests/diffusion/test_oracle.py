"""Second opinions on what the tests take for true: diffusers' converters of checkpoints on the names, the layers of
LyCORIS and PEFT on the formulas."""

import importlib
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.diffusion.oracle import KINDS, Draw, Trained
from tests.diffusion.spellings import Site, flux_sites, sd3_sites, sgm_sites
from tests.diffusion.tiny import build

pytestmark = pytest.mark.slow

LYCORIS: dict[str, tuple[str, dict[str, Any], str]] = {
    "lora": ("locon.LoConModule", {}, "linear conv"),
    "tucker": ("locon.LoConModule", {"use_tucker": True}, "conv"),
    "dora_rows": ("locon.LoConModule", {"weight_decompose": True}, "linear conv"),
    "dora_columns": ("locon.LoConModule", {"weight_decompose": True, "wd_on_out": False}, "linear conv"),
    "dora_tucker": ("locon.LoConModule", {"weight_decompose": True, "use_tucker": True}, "conv"),
    "loha": ("loha.LohaModule", {}, "linear conv"),
    "loha_tucker": ("loha.LohaModule", {"use_tucker": True}, "conv"),
    "dora_loha_rows": ("loha.LohaModule", {"weight_decompose": True}, "linear conv"),
    "dora_loha_columns": ("loha.LohaModule", {"weight_decompose": True, "wd_on_out": False}, "linear conv"),
    "lokr": ("lokr.LokrModule", {"factor": 4, "full_matrix": True}, "linear conv"),
    "lokr_w2_split": ("lokr.LokrModule", {"factor": 4}, "linear conv"),
    "lokr_both_split": ("lokr.LokrModule", {"factor": 4, "decompose_both": True}, "linear conv"),
    "lokr_tucker": ("lokr.LokrModule", {"factor": 4, "use_tucker": True}, "conv"),
    "dora_lokr_rows": ("lokr.LokrModule", {"factor": 4, "weight_decompose": True}, "linear conv"),
    "dora_lokr_columns": ("lokr.LokrModule", {"factor": 4, "weight_decompose": True, "wd_on_out": False}, "linear"),
    "glora": ("glora.GLoRAModule", {}, "linear conv"),
    "ia3_rows": ("ia3.IA3Module", {}, "linear conv"),
    "ia3_columns": ("ia3.IA3Module", {"train_on_input": True}, "linear conv"),
    "oft": ("diag_oft.DiagOFTModule", {}, "linear conv"),
    "oft_constraint": ("diag_oft.DiagOFTModule", {"constraint": 0.01}, "linear conv"),
    "oft_rescaled": ("diag_oft.DiagOFTModule", {"rescaled": True}, "linear conv"),
    "boft": ("boft.ButterflyOFTModule", {}, "linear conv"),
    "boft_rescaled": ("boft.ButterflyOFTModule", {"constraint": 0.02, "rescaled": True}, "linear conv"),
    "full": ("full.FullModule", {}, "linear conv"),
    "norm": ("norms.NormModule", {}, "norm"),
}
PEFT = {
    "lora": "lora linear",
    "conv": "lora conv",
    "bias": "lora_up_bias linear",
    "dora": "dora_peft linear",
    "loha": "loha linear",
}
CONVERTED: dict[str, tuple[Callable[[Iterable[str]], Iterator[Site]], str, int]] = {
    "sd15": (sgm_sites, "convert_ldm_unet_checkpoint", 1),
    "sdxl": (sgm_sites, "convert_ldm_unet_checkpoint", 1),
    "sd3": (sd3_sites, "convert_sd3_transformer_checkpoint_to_diffusers", 1),
    "flux": (flux_sites, "convert_flux_transformer_checkpoint_to_diffusers", 48),  # it knows one width: 3072
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def _layer(form: str) -> tuple[torch.nn.Module, Tensor]:
    """A layer with more rows than columns, and an input; widths that LoKr can split at 4."""
    torch.manual_seed(3)
    if form == "linear":
        return torch.nn.Linear(96, 128), torch.randn(2, 5, 96)
    if form == "norm":
        return torch.nn.LayerNorm(24), torch.randn(2, 24)
    return torch.nn.Conv2d(48, 64, 3, padding=1), torch.randn(2, 48, 6, 6)


def _expected(layer: torch.nn.Module, x: Tensor, made: Trained) -> Tensor:
    bias: Any = made.bias if made.bias is not None else layer.bias.double()
    assert made.weight is not None
    if isinstance(layer, torch.nn.Linear):
        return torch.nn.functional.linear(x.double(), made.weight, bias)
    if isinstance(layer, torch.nn.LayerNorm):
        return torch.nn.functional.layer_norm(x.double(), layer.normalized_shape, made.weight, bias)
    assert isinstance(layer, torch.nn.Conv2d)
    return torch.nn.functional.conv2d(x.double(), made.weight, bias, padding=1)


def _made(kind: str, layer: torch.nn.Module, rank: int, alpha: float) -> Trained:
    draw = Draw(torch.Generator().manual_seed(5), rank=rank, alpha=alpha)
    return KINDS[kind].make(layer.weight.detach().double(), layer.bias.detach().double(), draw)


def _fill(module: torch.nn.Module, made: Trained) -> None:
    """Each stored tensor is a parameter of LyCORIS's module by the same name; none is left over."""
    with torch.no_grad():
        for part, value in made.parts.items():
            if part in ("on_input", "alpha"):
                continue
            name = {"diff": "weight", "diff_b": "bias"}.get(part, part)
            own = getattr(module, name)
            own = own if isinstance(own, Tensor) else own.weight
            assert own.shape == value.shape, part
            own.copy_(value)


@pytest.mark.parametrize("kind,form", [(k, form) for k, told in LYCORIS.items() for form in told[2].split()])
def test_oracle_of_a_lycoris_kind_is_lycoris_own_forward(kind: str, form: str) -> None:
    where, settings, _ = LYCORIS[kind]
    module_name, class_name = where.split(".")
    cls = getattr(importlib.import_module(f"lycoris.modules.{module_name}"), class_name)
    layer, x = _layer(form)
    rank, alpha = (1, 0.5) if kind == "lokr_both_split" else (4, 3.0)
    made = _made(kind, layer, rank, alpha)
    wide = {} if form == "norm" else {"lora_dim": rank, "alpha": alpha}
    net = cls("m", layer, 1.0, **wide, **settings).eval()
    assert sum(p.numel() for p in net.parameters()) == sum(
        v.numel() for n, v in made.parts.items() if n not in ("alpha", "on_input")
    )
    with torch.no_grad():
        untouched = layer(x)
        wanted = _expected(layer, x, made)
        _fill(net, made)
        net.is_diff = kind == "full"
        net.apply_to()
        got = layer(x).double()
    size = float(wanted.abs().max())
    assert float((got - wanted).abs().max()) < 1e-5 * max(size, 1)
    assert float((untouched.double() - wanted).abs().max()) > 0.01 * size


@pytest.mark.parametrize("case", PEFT)
def test_oracle_of_a_peft_kind_is_pefts_own_forward(case: str) -> None:
    from peft import LoHaConfig, LoraConfig, get_peft_model

    kind, form = PEFT[case].split()
    layer, x = _layer(form)
    made = _made(kind, layer, 4, 3.0)
    wanted = _expected(layer, x, made)
    if kind == "loha":
        config: Any = LoHaConfig(r=4, alpha=3.0, target_modules=["0"])
    else:
        more = {"use_dora": kind == "dora_peft", "lora_bias": kind == "lora_up_bias"}
        config = LoraConfig(r=4, lora_alpha=3.0, target_modules=["0"], **more)
    model = get_peft_model(torch.nn.Sequential(layer), config).eval()
    part_names = {
        "lora_down": "lora_A.default.weight",
        "lora_up": "lora_B.default.weight",
        "lora_up_bias": "lora_B.default.bias",
        "magnitude": "lora_magnitude_vector.default.weight",
    }
    state = {
        f"base_model.model.0.{part_names.get(part, f'{part}.default')}": value for part, value in made.parts.items()
    }
    assert set(state) <= set(model.state_dict())
    model.load_state_dict(state, strict=False)
    with torch.no_grad():
        assert float((model(x).double() - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("family", CONVERTED)
def test_original_names_are_those_that_diffusers_converts(family: str) -> None:
    """Each row of each weight has a number of its own; converted, every number is where diffusers' base has it."""
    from diffusers.loaders import single_file_utils

    sites, function, wider = CONVERTED[family]
    pipe = build(family)
    model = pipe.unet if family in ("sd15", "sdxl") else pipe.transformer
    numbered, given, next_number = {}, {}, 0
    for name, value in model.state_dict().items():
        rows = value.shape[0] * wider
        numbered[name] = torch.arange(next_number, next_number + rows, dtype=torch.float64)
        next_number += rows
        if value.dim() > 1:
            numbered[name] = numbered[name].reshape(rows, *[1] * (value.dim() - 1))
    modules = {n.rpartition(".")[0] for n in numbered if n.endswith(".weight")}
    prefix = "model.diffusion_model." if function.startswith("convert_ldm") else ""
    for site in sites(modules):
        for ending in ("weight", "bias"):
            if all(f"{t}.{ending}" in numbered for t in site.targets):
                whole = torch.cat([numbered[f"{t}.{ending}"] for t in site.targets])
                whole = whole.roll(len(whole) // 2, 0) if site.swap else whole
                ending = "scale" if "query_norm" in site.spelled or "key_norm" in site.spelled else ending
                given[f"{prefix}{site.spelled}.{ending}"] = whole
    if "pos_embed.pos_embed" in numbered:
        given["pos_embed"] = numbered["pos_embed.pos_embed"]
    convert = getattr(single_file_utils, function)
    found = convert(given, config=dict(model.config)) if prefix else convert(given)
    assert set(found) == set(numbered)
    for name, value in numbered.items():
        assert torch.equal(found[name].flatten(), value.flatten()), name


def test_kinds_have_a_second_opinion() -> None:
    """What no library has a layer for is said here, with the reason."""
    alone = {
        "lokr_w1_split",  # LyCORIS splits the first factor only together with a larger second one
        "lokr_tucker_w1_split",  # as the one above, by hand
        "lora_and_bias",  # LoRA and full together
        "replaced",  # this and the next need none
        "replaced_norm",
        "zero",
    }
    assert set(KINDS) - set(LYCORIS) - {told.split()[0] for told in PEFT.values()} == alone
