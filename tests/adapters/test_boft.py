"""BOFT against PEFT's unmerged forward in float64, also with the factors that PEFT has only on CUDA."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import BOFTConfig
from peft.tuners.boft import layer as peft_layer
from safetensors.torch import load_file

from lora_export.adapters import boft
from lora_export.errors import AdapterError
from tests.adapters.test_vera import WEIGHTS, check_against_peft, edit, opened, saved


class BlockDiagonal:
    """What PEFT's CUDA extension computes: (factors, blocks, n, n) → (factors, blocks·n, blocks·n)."""

    @staticmethod
    def forward(blocks: torch.Tensor) -> list[torch.Tensor]:
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]


@pytest.fixture
def with_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_layer, "get_fbd_cuda", lambda: BlockDiagonal)


@pytest.fixture
def without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_layer, "get_fbd_cuda", lambda: None)


def config(*targets: str, **settings: Any) -> BOFTConfig:
    return BOFTConfig(target_modules=list(targets), **{"boft_block_size": 4, **settings})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"boft_block_size": 1},
        {"boft_block_size": 0, "boft_block_num": 1},
        {"boft_block_size": 0, "boft_block_num": 4},
        {"boft_dropout": 0.5},
    ],
)
def test_boft_single_factor_equals_formula(
    tmp_path: Path, settings: dict[str, Any], without_extension: None
) -> None:
    names = ("up", "down", "square", "point", "patch")
    targets = check_against_peft(saved(tmp_path, config(*names, **settings)), boft.read)
    assert targets == {f"{n}.weight" for n in names}


@pytest.mark.parametrize(
    ("factors", "settings", "names"),
    [
        (2, {"boft_block_size": 2}, ("up", "square", "point", "patch", "wide")),
        (2, {"boft_block_size": 6}, ("up", "point", "patch")),
        (3, {"boft_block_size": 2}, ("wide",)),
        (3, {"boft_block_size": 0, "boft_block_num": 4}, ("wide",)),
        (4, {"boft_block_size": 2}, ("wide",)),
    ],
)
def test_boft_butterfly_factors_equal_formula(
    tmp_path: Path, factors: int, settings: dict[str, int], names: tuple[str, ...], with_extension: None
) -> None:
    folder = saved(tmp_path, config(*names, boft_n_butterfly_factor=factors, **settings))
    assert all(v.shape[0] == factors for k, v in load_file(folder / WEIGHTS).items() if "boft_R" in k)
    check_against_peft(folder, boft.read)


def test_boft_without_cuda_extension_has_one_factor(tmp_path: Path, without_extension: None) -> None:
    folder = saved(tmp_path, config("wide", boft_n_butterfly_factor=3))
    assert json.loads((folder / "adapter_config.json").read_text())["boft_n_butterfly_factor"] == 3
    check_against_peft(folder, boft.read)


def test_boft_on_other_base_is_refused(tmp_path: Path, without_extension: None) -> None:
    updates = {u.target: u for u in boft.read(opened(saved(tmp_path, config("up", "patch"))))}
    up, patch = updates["up.weight"], updates["patch.weight"]
    assert up.shapes == ((20, 12),)
    assert patch.shapes == ((6, 36, 1, 1), (6, 9, 2, 2), (6, 4, 3, 3), (6, 1, 6, 6))
    assert not patch.fits((6, 36)) and not patch.fits((5, 4, 3, 3))


@pytest.mark.parametrize("ending", ["", ".default"])
@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_boft_key_spellings_are_read(tmp_path: Path, prefix: str, ending: str, without_extension: None) -> None:
    folder = saved(tmp_path, config("up"))
    values = {p: load_file(folder / WEIGHTS)[f"base_model.model.up.{p}"] for p in ("boft_R", "boft_s")}
    edit(folder, lambda v: (v.clear(), v.update({f"{prefix}up.{p}{ending}": t for p, t in values.items()})))
    (update,) = boft.read(opened(folder))
    assert update.target == "up.weight" and len(update.keys) == 2


@pytest.mark.parametrize(
    ("values", "settings", "message"),
    [
        ({"boft_s": None}, {}, "boft_s of this module is missing"),
        ({"boft_R": None}, {}, "boft_R of this module is missing"),
        ({"boft_R": torch.zeros(3, 4, 4)}, {}, r"\[3, 4, 4\]"),
        ({"boft_R": torch.zeros(1, 3, 4, 2)}, {}, r"\[1, 3, 4, 2\]"),
        ({"boft_R": torch.zeros(1, 0, 4, 4)}, {}, r"\[1, 0, 4, 4\]"),
        ({"boft_s": torch.ones(20)}, {}, r"\[20\]"),
        ({"boft_s": torch.ones(10, 2)}, {}, r"\[10, 2\]"),
        ({"boft_R": torch.zeros(2, 3, 4, 4)}, {}, "2 butterfly factors, boft_n_butterfly_factor is 1"),
        ({"boft_R": torch.zeros(2, 3, 4, 4)}, {"boft_n_butterfly_factor": 2}, "cannot be interleaved 1 times"),
        ({"boft_R": torch.zeros(2, 4, 3, 3)}, {"boft_n_butterfly_factor": 2}, "blocks of an even size"),
        ({"boft_R": torch.zeros(3, 2, 6, 6)}, {"boft_n_butterfly_factor": 3}, r"a multiple of 2\^2"),
        ({}, {"boft_n_butterfly_factor": None}, "boft_n_butterfly_factor is None"),
    ],
)
def test_boft_damaged_adapter_is_refused(
    tmp_path: Path,
    values: dict[str, torch.Tensor | None],
    settings: dict[str, Any],
    message: str,
    without_extension: None,
) -> None:
    folder = saved(tmp_path, config("up"))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for part, value in values.items():
            del tensors[f"base_model.model.up.{part}"]
            if value is not None:
                tensors[f"base_model.model.up.{part}"] = value

    edit(folder, change)
    with pytest.raises(AdapterError, match=message):
        boft.read(opened(folder, **settings))


def test_boft_with_weight_is_refused(tmp_path: Path, without_extension: None) -> None:
    with pytest.raises(AdapterError, match="BOFT is not a delta"):
        boft.read(opened(saved(tmp_path, config("up")), 0.5))


def test_boft_ignores_files_of_other_kinds(tmp_path: Path, without_extension: None) -> None:
    folder = saved(tmp_path, config("up"))
    edit(folder, lambda v: (v.clear(), v.update({"score.weight": torch.ones(2, 3)})))
    assert boft.read(opened(folder)) == []
