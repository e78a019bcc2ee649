"""Each kind's merged layer against the forward of the library that trains it: LyCORIS and PEFT."""

import importlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.diffusion.modules import LAYER, Case, Tensors


@dataclass(frozen=True)
class Theirs:
    """A module of LyCORIS: file and class, on a layer of torch. single: it computes rotations in fp32 alone."""

    name: str
    layer: Callable[[], torch.nn.Module]
    options: Mapping[str, Any] = field(default_factory=dict)
    single: bool = False

    def build(self, strength: float) -> tuple[Any, torch.nn.Module]:
        """The module with random numbers, and its layer."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path, _, attribute = self.name.partition(":")
            cls = getattr(importlib.import_module(f"lycoris.modules.{path}"), attribute)
        torch.manual_seed(0)
        layer = self.layer()
        randomize(layer)
        settings = {} if path == "norms" else {"lora_dim": 4, "alpha": 2.0, **self.options}
        network = cls("m", layer, strength, **settings).eval()
        randomize(network)
        return (network, layer) if self.single else (network.double(), layer.double())


def randomize(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, value in module.named_parameters():
            noise = 0.3 * torch.randn_like(value)
            value.copy_(value * (1 + noise) if name == "dora_scale" else noise + float("rescale" in name))


def lin(inputs: int = 24, outputs: int = 32) -> Callable[[], torch.nn.Module]:
    return lambda: torch.nn.Linear(inputs, outputs)


def conv(inputs: int = 16, outputs: int = 24) -> Callable[[], torch.nn.Module]:
    return lambda: torch.nn.Conv2d(inputs, outputs, 3, padding=1)


LOCON, LOHA, LOKR = "locon:LoConModule", "loha:LohaModule", "lokr:LokrModule"
GLORA, IA3, OFT = "glora:GLoRAModule", "ia3:IA3Module", "diag_oft:DiagOFTModule"
BOFT, FULL, NORM = "boft:ButterflyOFTModule", "full:FullModule", "norms:NormModule"
DORA = {"weight_decompose": True}
SUMS = {
    "LoRA": Theirs(LOCON, lin()), "LoCon": Theirs(LOCON, conv()),
    "LoCon with a core": Theirs(LOCON, conv(), {"use_tucker": True}),
    "rank-stabilised": Theirs(LOCON, lin(), {"rs_lora": True}),
    "scalar": Theirs(LOCON, lin(), {"use_scalar": True}),
    "LoHa": Theirs(LOHA, lin()), "LoHa conv": Theirs(LOHA, conv()),
    "LoHa with cores": Theirs(LOHA, conv(), {"use_tucker": True}),
    "LoKr": Theirs(LOKR, lin(), {"factor": 4}), "LoKr a, b": Theirs(LOKR, lin(128, 128), {"factor": 4}),
    "LoKr both a, b": Theirs(LOKR, lin(512, 512), {"factor": 16, "decompose_both": True}),
    "LoKr conv": Theirs(LOKR, conv(64, 64), {"factor": 4}),
    "LoKr with a core": Theirs(LOKR, conv(64, 64), {"factor": 4, "use_tucker": True}),
    "LoKr whole": Theirs(LOKR, lin(), {"factor": 4, "full_matrix": True}),
    "GLoRA": Theirs(GLORA, lin()), "GLoRA conv": Theirs(GLORA, conv()),
    "full": Theirs(FULL, lin()), "full conv": Theirs(FULL, conv()),
    "LayerNorm": Theirs(NORM, lambda: torch.nn.LayerNorm(24)),
    "GroupNorm": Theirs(NORM, lambda: torch.nn.GroupNorm(4, 16)),
}  # fmt: skip
OTHERS = {
    "DoRA": Theirs(LOCON, lin(), DORA), "DoRA conv": Theirs(LOCON, conv(), DORA),
    "DoRA of inputs": Theirs(LOCON, lin(), {**DORA, "wd_on_out": False}),
    "DoRA conv of inputs": Theirs(LOCON, conv(), {**DORA, "wd_on_out": False}),
    "LoHa DoRA": Theirs(LOHA, lin(), DORA), "LoKr DoRA": Theirs(LOKR, lin(128, 128), {**DORA, "factor": 4}),
    "IA3": Theirs(IA3, lin()), "IA3 of inputs": Theirs(IA3, lin(), {"train_on_input": True}),
    "IA3 conv": Theirs(IA3, conv()),
    "IA3 conv of inputs": Theirs(IA3, conv(), {"train_on_input": True}),
    "OFT": Theirs(OFT, lin(), {"alpha": 0}, True), "OFT limited": Theirs(OFT, lin(), {"constraint": 0.01}, True),
    "OFT conv rescaled": Theirs(OFT, conv(), {"rescaled": True}, True),
    "BOFT": Theirs(BOFT, lin(), {"alpha": 0}, True),
    "BOFT limited, rescaled": Theirs(BOFT, lin(24, 64), {"constraint": 0.01, "rescaled": True}, True),
}  # fmt: skip
CASES = [(label, m) for m in (1.0, 0.6) for label in SUMS] + [(label, 1.0) for label in OTHERS]


@pytest.mark.parametrize(("label", "strength"), CASES)
def test_merged_layer_is_lycoris_forward(label: str, strength: float, tmp_path: Path) -> None:
    theirs = (SUMS | OTHERS)[label]
    network, layer = theirs.build(strength)
    base = {f"{LAYER}.{name}": value.detach().clone() for name, value in layer.named_parameters()}
    width = next(iter(layer.parameters())).shape[1:2] or next(iter(layer.parameters())).shape
    shape = (2, width[0], 6, 6) if isinstance(layer, torch.nn.Conv2d | torch.nn.GroupNorm) else (2, 5, width[0])
    x = torch.randn(shape, dtype=base[f"{LAYER}.weight"].dtype)
    with torch.no_grad():
        before = layer(x)
        network.apply_to()
        expected = layer(x)
        own = {k: v.clone() for k, v in (network.custom_state_dict() or network.state_dict()).items()}
        network.restore()
    adapted = Case({k.removesuffix(".weight"): v for k, v in own.items()}, base, weight=strength)
    merged = adapted.open(tmp_path).merged()
    with torch.no_grad():
        for name, value in layer.named_parameters():
            value.copy_(merged[f"{LAYER}.{name}"])
        got = layer(x)
    assert (expected - before).abs().max() > 0.05
    assert (got - expected).abs().max() < (1e-5 if theirs.single else 1e-12)


@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize("options", [{"lora_bias": True}, {"use_dora": True}])
def test_merged_layer_is_pefts_forward(options: dict[str, bool], convolution: bool, tmp_path: Path) -> None:
    import peft

    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"layer": (conv() if convolution else lin())()})
    randomize(model)
    base = {f"{LAYER}.{name}": value.detach().double() for name, value in model["layer"].named_parameters()}
    adapted = peft.inject_adapter_in_model(
        peft.LoraConfig(r=4, lora_alpha=6, target_modules=["layer"], **options), model.double()
    )
    names = {"A": "lora_down", "B": "lora_up", "magnitude_vector": "magnitude"}
    own: Tensors = {"alpha": torch.tensor(6.0)}
    for name, value in adapted.named_parameters():
        if "lora_" in name:
            value.data = 0.3 * torch.randn_like(value) + float("magnitude" in name)
            part = names[name.partition("lora_")[2].partition(".")[0]]
            own[f"{part}_bias" if name.endswith("bias") else part] = value.detach().clone()
    if "magnitude" in own:
        own["magnitude"] = own["magnitude"].reshape(-1)
    x = torch.randn((2, 16, 6, 6) if convolution else (2, 5, 24), dtype=torch.float64)
    merged = Case(own, base).open(tmp_path).merged()
    layer = (conv() if convolution else lin())().double()
    with torch.no_grad():
        for name, value in layer.named_parameters():
            value.copy_(merged[f"{LAYER}.{name}"])
        assert (layer(x) - adapted["layer"].eval()(x)).abs().max() < 1e-11
