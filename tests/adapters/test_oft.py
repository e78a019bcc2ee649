"""OFT against PEFT's unmerged forward in float64: every way to make the blocks, and what must be refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import OFTConfig, PeftModel
from safetensors.torch import load_file

from lora_export.adapters import oft
from lora_export.errors import AdapterError
from tests.adapters.test_vera import WEIGHTS, Layers, check_against_peft, edit, merged, opened, saved

NAMES = ("up", "down", "square", "point", "table")


def config(*targets: str, **settings: Any) -> OFTConfig:
    return OFTConfig(target_modules=list(targets), **{"oft_block_size": 4, **settings})


@pytest.mark.parametrize(
    "settings",
    [
        {"use_cayley_neumann": False},
        {"use_cayley_neumann": False, "block_share": True},
        {"use_cayley_neumann": False, "oft_block_size": 0, "r": 2},
        {"use_cayley_neumann": False, "oft_block_size": 0, "r": 1},
        {"use_cayley_neumann": False, "coft": True, "eps": 0.7},
        {"coft": True, "eps": 0.7, "block_share": True},
        {"oft_block_size": 5},
        {"module_dropout": 0.5},
        *({"num_cayley_neumann_terms": n} for n in (2, 3, 4, 5, 6, 9)),
    ],
)
def test_oft_every_setting_and_layer_equals_formula(tmp_path: Path, settings: dict[str, Any]) -> None:
    targets = check_against_peft(saved(tmp_path, config(*NAMES, **settings)), oft.read)
    assert targets == {f"{n}.weight" for n in NAMES}


def test_oft_one_neumann_term_is_identity(tmp_path: Path) -> None:
    weight = torch.randn(20, 12)
    (update,) = oft.read(opened(saved(tmp_path, config("up", num_cayley_neumann_terms=1))))
    assert torch.equal(merged(update, weight), weight)


def test_coft_keeps_blocks_within_limit(tmp_path: Path) -> None:
    check_against_peft(saved(tmp_path, config("up", "down", coft=True, eps=50.0)), oft.read)


def test_oft_grouped_convolution_with_shared_block_equals_formula(tmp_path: Path) -> None:
    folder = saved(tmp_path, config("groups", block_share=True))
    check_against_peft(folder, oft.read)
    (update,) = oft.read(opened(folder))
    assert not update.fits((6, 6, 1, 1))  # six inputs are no whole blocks


def test_oft_wide_convolution_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, config("patch"), size=0.0)
    (update,) = oft.read(opened(folder))
    with pytest.raises(AdapterError, match="3×3 pixels"):
        update.fits((6, 4, 3, 3))
    # The reason: PEFT's layer with a rotation by nothing is not the layer without it.
    layer = PeftModel.from_pretrained(Layers(), folder).eval().base_model.model.patch
    x = torch.randn(2, 4, 7, 6)
    assert not torch.allclose(layer(x), layer.base_layer(x), atol=0.1)


def test_oft_on_other_base_is_refused(tmp_path: Path) -> None:
    updates = {u.target: u for u in oft.read(opened(saved(tmp_path, config("up", "table"))))}
    assert updates["up.weight"].fits((7, 12)) and updates["up.weight"].fits((7, 12, 1, 1))
    assert not updates["up.weight"].fits((12, 16)) and not updates["up.weight"].fits((12,))
    assert not updates["table.weight"].fits((7, 12, 1, 1))


@pytest.mark.parametrize("ending", ["", ".default"])
@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_oft_key_spellings_are_read(tmp_path: Path, prefix: str, ending: str) -> None:
    folder = saved(tmp_path, config("up"))
    value = load_file(folder / WEIGHTS)["base_model.model.up.oft_R.weight"]
    edit(folder, lambda v: (v.clear(), v.update({f"{prefix}up.oft_R{ending}.weight": value})))
    (update,) = oft.read(opened(folder))
    assert update.target == "up.weight"


@pytest.mark.parametrize(
    ("version", "refused"),
    [
        ("0.21.2", False),
        ("0.18.0", False),
        ("0.18.1.dev0@abc", False),
        ("0.18.0.dev0@abc", True),
        ("0.17.1", True),
        (None, True),
        ("newest", True),
    ],
)
def test_oft_series_follows_version(tmp_path: Path, version: str | None, refused: bool) -> None:
    folder = saved(tmp_path, config("up"))
    if refused:
        with pytest.raises(AdapterError, match=r"before 0.18|peft_version is 'newest'"):
            oft.read(opened(folder, peft_version=version))
    else:
        assert oft.read(opened(folder, peft_version=version))
    # What did not change with that version is taken from any.
    assert oft.read(opened(folder, peft_version=version, use_cayley_neumann=False))
    assert oft.read(opened(folder, peft_version=version, num_cayley_neumann_terms=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_cayley_neumann": None}, "use_cayley_neumann is None"),
        ({"coft": "yes"}, "coft is 'yes'"),
        ({"block_share": None}, "block_share is None"),
        ({"block_share": True}, r"the shape is \[3, 6\]; block_share is true"),
        ({"num_cayley_neumann_terms": 0}, "num_cayley_neumann_terms is 0"),
        ({"coft": True, "eps": "small"}, "eps is 'small'"),
        ({"coft": True, "eps": -1.0}, "eps is -1"),
    ],
)
def test_oft_unknown_settings_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    folder = saved(tmp_path, config("up"))
    with pytest.raises(AdapterError, match=message):
        oft.read(opened(folder, **settings))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"up.oft_r": torch.ones(3, 4, 4)}, "PEFT before 0.16"),
        ({"up.oft_R.weight": torch.ones(3, 7)}, r"\[3, 7\]"),
        ({"up.oft_R.weight": torch.ones(3, 4, 4)}, r"\[3, 4, 4\]"),
        ({"up.oft_R.weight": torch.ones(0, 6)}, r"\[0, 6\]"),
        ({"up.oft_R.weight": torch.ones(3, 6), "up.oft_embedding_R.weight": torch.ones(3, 6)}, "two rotations"),
    ],
)
def test_oft_unknown_tensors_are_refused(tmp_path: Path, values: dict[str, torch.Tensor], message: str) -> None:
    folder = saved(tmp_path, config("up"))
    edit(folder, lambda v: (v.clear(), v.update(values)))
    with pytest.raises(AdapterError, match=message):
        oft.read(opened(folder))


def test_oft_with_weight_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="OFT is not a delta"):
        oft.read(opened(saved(tmp_path, config("up")), 0.5))


def test_oft_ignores_files_of_other_kinds(tmp_path: Path) -> None:
    folder = saved(tmp_path, config("up"))
    edit(folder, lambda v: (v.clear(), v.update({"score.weight": torch.ones(2, 3)})))
    assert oft.read(opened(folder)) == []
