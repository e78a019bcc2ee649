"""VeRA against PEFT's unmerged forward in float64, and the helpers that OFT's and BOFT's tests share."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_export.adapters import AdapterFile, vera
from lora_export.adapters.spelling import respelled
from lora_export.checkpoint import open_adapter_files
from lora_export.contracts import TargetUpdate
from lora_export.errors import AdapterError

WEIGHTS = "adapter_model.safetensors"
Read = Callable[[AdapterFile], list[TargetUpdate]]


class Layers(nn.Module):
    """Layers of every sort and of different shapes; nothing runs them in a row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 8, bias=False)
        self.square = nn.Linear(12, 12)
        self.flipped = Conv1D(10, 8)
        self.flipped_square = Conv1D(8, 8)
        self.point = nn.Conv2d(12, 6, 1)
        self.groups = nn.Conv2d(16, 6, 1, groups=2)
        self.patch = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.table = nn.Embedding(11, 12)
        self.wide = nn.Linear(16, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x)


INPUTS = {
    "point": (3, 12, 4, 5),
    "groups": (3, 16, 4, 5),
    "patch": (3, 4, 7, 6),
    "down": (3, 20),
    "wide": (3, 16),
    "flipped": (3, 8),
    "flipped_square": (3, 8),
}


def saved(folder: Path, config: PeftConfig, size: float = 0.3) -> Path:
    """An adapter that PEFT made and saved, its trained tensors random; `size` is their standard deviation."""
    model = get_peft_model(Layers(), config)
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, size, generator=generator)
    model.save_pretrained(folder)
    return folder


def opened(folder: Path, weight: float = 1.0, **changes: Any) -> AdapterFile:
    config, tensors = open_adapter_files(folder)
    return respelled(AdapterFile(tensors, {**config, **changes}, folder / "adapter_config.json", weight))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """The same file with other tensors."""
    values = load_file(folder / WEIGHTS)
    change(values)
    save_file({k: v.contiguous() for k, v in values.items()}, folder / WEIGHTS)


def merged(update: TargetUpdate, weight: torch.Tensor, step: int = 3) -> torch.Tensor:
    """The fp32 weight after the update, given in blocks of rows where the update allows it."""
    assert update.fits(tuple(weight.shape))
    loaded = update.load(tuple(weight.shape))
    step = step if update.row_wise(tuple(weight.shape)) else len(weight)
    blocks = [slice(i, min(i + step, len(weight))) for i in range(0, len(weight), step)]
    return torch.cat([loaded.apply(weight[rows].clone(), rows) for rows in blocks])


def check_against_peft(folder: Path, read: Read) -> set[str]:
    """Each layer with its merged weight computes what PEFT's unmerged layer does in float64. Returns targets."""
    base, model = Layers(), PeftModel.from_pretrained(Layers(), folder).eval()
    updates = read(opened(folder))
    keys = [k for u in updates for k in u.keys]
    assert sorted(keys) == sorted(opened(folder).tensors)
    model.double()
    for update in updates:
        name = update.target.removesuffix(".weight")
        layer, plain = model.base_model.model.get_submodule(name), base.get_submodule(name)
        assert isinstance(plain, nn.Linear | Conv1D | nn.Conv2d | nn.Embedding)
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(INPUTS.get(name, (3, 12)), generator=generator, dtype=torch.float64)
        given = torch.arange(11) if name == "table" else x
        weight = merged(update, plain.weight.detach())
        assert (weight - plain.weight).norm() > 0.01 * plain.weight.norm()
        plain.weight.data = weight
        with torch.no_grad():
            exact, found = layer(given), plain.double()(given)
        assert (found - exact).norm() <= 1e-6 * exact.norm(), name
    return {u.target for u in updates}


def vera_config(*targets: str, **settings: Any) -> VeraConfig:
    return VeraConfig(r=6, target_modules=list(targets), projection_prng_key=17, **settings)


def test_vera_shared_projections_are_sliced_by_shape(tmp_path: Path) -> None:
    names = ("up", "down", "square")
    targets = check_against_peft(saved(tmp_path, vera_config(*names)), vera.read)
    assert targets == {f"{n}.weight" for n in names}


def test_vera_conv1d_follows_shape_or_configuration(tmp_path: Path) -> None:
    folder = saved(tmp_path, vera_config("up", "flipped", "flipped_square"))
    assert json.loads((folder / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    check_against_peft(folder, vera.read)


def test_vera_conv1d_against_configuration_is_refused(tmp_path: Path) -> None:
    # PEFT keeps the flag of the last layer, and here that is a linear one.
    folder = saved(tmp_path, vera_config("flipped", "wide"))
    assert json.loads((folder / "adapter_config.json").read_text())["fan_in_fan_out"] is False
    (flipped,) = [u for u in vera.read(opened(folder)) if u.target == "flipped.weight"]
    with pytest.raises(AdapterError, match="fan_in_fan_out is false"):
        flipped.fits((8, 10))
    assert flipped.fits((10, 8)) and not flipped.fits((17, 10))
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"fan_in_fan_out": True}))
    check_against_peft(folder, vera.read)


def test_vera_weight_scales_delta(tmp_path: Path) -> None:
    folder, weight = saved(tmp_path, vera_config("up", "down")), torch.randn(20, 12)
    (once,) = [u for u in vera.read(opened(folder)) if u.target == "up.weight"]
    (scaled,) = [u for u in vera.read(opened(folder, -0.25)) if u.target == "up.weight"]
    delta = merged(once, weight) - weight
    torch.testing.assert_close(merged(scaled, weight), weight - 0.25 * delta, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ending", ["", ".default"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_vera_key_spellings_are_read(tmp_path: Path, wrapped: bool, ending: str) -> None:
    folder, weight = saved(tmp_path, vera_config("up")), torch.randn(20, 12)
    (update,) = vera.read(opened(folder))
    expected = merged(update, weight)

    def rename(values: dict[str, torch.Tensor]) -> None:
        for key in list(values):
            name = key if wrapped else key.removeprefix("base_model.model.").removeprefix("base_model.")
            values[f"{name}{ending}"] = values.pop(key)

    edit(folder, rename)
    (renamed,) = vera.read(opened(folder))
    assert len(renamed.keys) == 4
    assert torch.equal(merged(renamed, weight), expected)


def test_vera_projections_are_redrawn_like_peft(tmp_path: Path) -> None:
    config = vera_config("up", "down", "square", save_projection=False)
    model = get_peft_model(Layers(), config)
    a, b = vera.regenerate(17, 6, 20, 13)
    assert torch.equal(a, model.base_model.vera_A["default"])
    assert torch.equal(b, model.base_model.vera_B["default"][:13])
    assert not torch.equal(a[:, :12], vera.regenerate(17, 6, 12, 13)[0])
    check_against_peft(saved(tmp_path / "one", vera_config("down", save_projection=False)), vera.read)


def test_vera_projections_of_several_layers_need_base(tmp_path: Path) -> None:
    folder = saved(tmp_path / "without", vera_config("up", "down", save_projection=False))
    with pytest.raises(AdapterError, match="save_projection is false") as error:
        vera.read(opened(folder))
    advice = str(error.value.next_step).removeprefix("in Python: ").replace("BASE_MODEL", "base")
    names = {"PeftModel": PeftModel, "base": Layers(), "ADAPTER": folder, "DIR": tmp_path / "with"}
    exec(advice, names)
    check_against_peft(tmp_path / "with", vera.read)


def test_vera_projections_are_redrawn_with_base_shapes(tmp_path: Path) -> None:
    folder = saved(tmp_path, vera_config("up", "down", save_projection=False))
    shapes = {f"model.{n}": tuple(p.shape) for n, p in Layers().named_parameters()}

    def read(file: Any) -> Any:
        return vera.read(dataclasses.replace(file, base_shapes=shapes))

    check_against_peft(folder, read)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda v: v.pop("base_model.vera_B"), {}, "vera_B cannot be found"),
        (lambda v: v.pop("base_model.model.up.vera_lambda_d"), {}, "vera_lambda_d of this module is missing"),
        (lambda v: v.update({"base_model.vera_A": torch.ones(5, 20)}), {}, r"vera_A has the shape \[5, 20\]"),
        (lambda v: v.update({"base_model.vera_B": torch.ones(19, 6)}), {}, r"lambda_b \[20\]"),
        (lambda v: v.update({"base_model.model.up.vera_lambda_d": torch.ones(5)}), {}, r"lambda_d \[5\]"),
        (lambda v: v.update({"base_model.model.up.vera_lambda_b": torch.ones(20, 1)}), {}, r"\[20, 1\]"),
        (lambda v: None, {"r": 7}, "and r is 7"),
        (lambda v: None, {"r": None}, "r is None"),
        (lambda v: None, {"save_projection": False}, "PEFT would not use"),
    ],
)
def test_vera_damaged_adapter_is_refused(
    tmp_path: Path, change: Any, settings: dict[str, Any], message: str
) -> None:
    folder = saved(tmp_path, vera_config("up", "down"))
    edit(folder, change)
    with pytest.raises(AdapterError, match=message):
        vera.read(opened(folder, **settings))


def test_vera_invalid_seed_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, vera_config("up", save_projection=False))
    with pytest.raises(AdapterError, match="projection_prng_key is None"):
        vera.read(opened(folder, projection_prng_key=None))


def test_vera_on_other_base_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, vera_config("up", "down"))
    (up,) = [u for u in vera.read(opened(folder)) if u.target == "up.weight"]
    assert up.fits((20, 12)) and up.fits((20, 20))
    assert not up.fits((20, 21))  # vera_A reaches 20 inputs
    assert not up.fits((12, 19)) and not up.fits((20,)) and not up.fits((20, 12, 1, 1))


def test_vera_nan_is_refused_on_reading(tmp_path: Path) -> None:
    folder = saved(tmp_path, vera_config("up"))
    edit(folder, lambda v: v["base_model.vera_A"].fill_(float("nan")))
    (update,) = vera.read(opened(folder))
    with pytest.raises(AdapterError, match="NaN"):
        update.load((20, 12))


def test_vera_ignores_files_of_other_kinds(tmp_path: Path) -> None:
    folder = saved(tmp_path, vera_config("up"))
    edit(folder, lambda v: [v.pop(k) for k in list(v) if "lambda" in k])
    assert vera.read(opened(folder)) == []
