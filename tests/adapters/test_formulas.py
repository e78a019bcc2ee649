"""IA3, LoHa, LoKr and AdaLoRA in blocks of rows, against their papers' formulas in float64, and what every kind
says of itself: its name, whether it adds, whether it has factors of low rank, whether a tied weight follows."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_export.adapters.updates import DECOMPOSITION
from lora_export.contracts import TargetUpdate
from tests.adapters.test_lora_family import close, in_blocks, random
from tests.builders import updates_of

GPT2 = frozenset({"gpt2"})  # its c_attn, c_proj and c_fc are Conv1D


def read(
    folder: Path, values: dict[str, torch.Tensor], models: frozenset[str] = frozenset(), **config: Any
) -> list[TargetUpdate]:
    return updates_of(folder, values, config, models)


def drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Other numbers for each, of one shape, too."""
    return {name: random(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def facts(update: TargetUpdate) -> tuple[str, str, bool, bool, bool]:
    return update.target, update.kind, update.adds, update.low_rank, update.optional


# --- IA3 ----------------------------------------------------------------------------------------------------


def test_ia3_scales_outputs_and_bias(tmp_path: Path) -> None:
    scale = random(9, 1)
    weight, bias = read(tmp_path, {"x.q_proj.ia3_l": scale}, peft_type="IA3", feedforward_modules=["up"])
    assert facts(weight) == ("x.q_proj.weight", "ia3", False, False, False)
    assert facts(bias) == ("x.q_proj.bias", "ia3", False, False, True)
    assert weight.fits((9, 5)) and not weight.fits((5, 9)) and not weight.fits((9, 5, 1))
    assert bias.fits((9,)) and not bias.fits((5,))
    given, vector = random(9, 7, seed=5), random(9, seed=6)
    close(in_blocks(weight, given), given.double() * scale.double())
    close(in_blocks(bias, vector), vector.double() * scale.double()[:, 0])


@pytest.mark.parametrize("named", [["up", "down_proj"], r".*\.down_p.*"])
def test_ia3_feedforward_scales_inputs(tmp_path: Path, named: Any) -> None:
    scale = random(1, 7)
    (update,) = read(tmp_path, {"x.down_proj.ia3_l": scale}, peft_type="IA3", feedforward_modules=named)
    assert facts(update) == ("x.down_proj.weight", "ia3", False, False, False)
    assert update.fits((9, 7)) and not update.fits((7, 9))
    given = random(10, 7, seed=5)
    close(in_blocks(update, given), given.double() * scale.double())


def test_ia3_pattern_must_match_whole_name(tmp_path: Path) -> None:
    found = read(tmp_path, {"x.down_proj.ia3_l": random(7, 1)}, peft_type="IA3", feedforward_modules="down_proj")
    assert [u.target for u in found] == ["x.down_proj.weight", "x.down_proj.bias"]


@pytest.mark.parametrize("feedforward", [False, True])
def test_ia3_on_conv1d_is_transposed(tmp_path: Path, feedforward: bool) -> None:
    scale = random(1, 7) if feedforward else random(7, 1)
    settings = {"peft_type": "IA3", "feedforward_modules": ["c_proj"] if feedforward else []}
    update = read(tmp_path, {"h.0.c_proj.ia3_l": scale}, GPT2, **settings)[0]
    given = random(7, 10, seed=5) if feedforward else random(10, 7, seed=5)  # (in, out)
    assert update.fits(tuple(given.shape)) and not update.fits(tuple(given.T.shape))
    factor = scale.double().reshape(-1, 1) if feedforward else scale.double().reshape(1, -1)
    close(in_blocks(update, given), given.double() * factor)


def test_ia3_on_linear_of_gpt2_is_not_transposed(tmp_path: Path) -> None:
    update = read(tmp_path, {"head.ia3_l": random(7, 1)}, GPT2, peft_type="IA3", feedforward_modules=[])[0]
    assert update.fits((7, 10)) and not update.fits((10, 7))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kernel", [(3,), (2, 3)])
def test_ia3_on_grouped_convolution_equals_formula(tmp_path: Path, groups: int, kernel: tuple[int, ...]) -> None:
    """Output row o belongs to group o // (outputs / groups), which sees the channels of that group alone."""
    outputs, inputs = 12, 8
    scale = random(1, inputs, *(1 for _ in kernel))
    (update,) = read(tmp_path, {"up.ia3_l": scale}, peft_type="IA3", feedforward_modules=["up"])
    given = random(outputs, inputs // groups, *kernel, seed=5)
    assert update.fits(tuple(given.shape))
    exact = given.double().clone()
    for o in range(outputs):
        group = o // (outputs // groups)
        for i in range(inputs // groups):
            exact[o, i] *= scale.double().reshape(-1)[group * (inputs // groups) + i]
    close(in_blocks(update, given, 5), exact)


# --- LoHa ---------------------------------------------------------------------------------------------------


def test_loha_equals_formula(tmp_path: Path) -> None:
    a, b, c, d = random(9, 4), random(4, 7, seed=2), random(9, 4, seed=3), random(4, 7, seed=4)
    values = {"x.hada_w1_a": a, "x.hada_w1_b": b, "x.hada_w2_a": c, "x.hada_w2_b": d}
    settings = {"peft_type": "LOHA", "r": 9, "alpha": 1, "rank_pattern": {"x": 4}, "alpha_pattern": {"x": 6}}
    (update,) = read(tmp_path, values, **settings)
    assert facts(update) == ("x.weight", "loha", True, False, False)
    given = random(9, 7, seed=5)
    exact = given.double() + 1.5 * (a.double() @ b.double()) * (c.double() @ d.double())
    close(in_blocks(update, given), exact)
    assert update.fits((9, 7)) and update.fits((9, 7, 1)) and not update.fits((7, 9))


def test_loha_with_cores_equals_formula(tmp_path: Path) -> None:
    """Tucker products: τ ×₁ aᵀ ×₂ bᵀ over a kernel of 3 (FedPara, proposition 3)."""
    shapes = {"t1": (4, 4, 3), "w1_a": (4, 8), "w1_b": (4, 6), "t2": (4, 4, 3), "w2_a": (4, 8), "w2_b": (4, 6)}
    parts = drawn(shapes)
    (update,) = read(tmp_path, {f"x.hada_{k}": v for k, v in parts.items()}, peft_type="LOHA", r=4, alpha=8)
    wide = {k: v.double() for k, v in parts.items()}
    one, two = (torch.einsum("ijk,io,jc->ock", wide[f"t{n}"], wide[f"w{n}_a"], wide[f"w{n}_b"]) for n in (1, 2))
    given = random(8, 6, 3, seed=5)
    assert update.fits((8, 6, 3)) and not update.fits((4, 6, 3)) and not update.fits((8, 6, 4))
    close(in_blocks(update, given), given.double() + 2 * one * two)


# --- LoKr ---------------------------------------------------------------------------------------------------

WHOLE = {"w1": (3, 2), "w2": (4, 5)}
LEFT = {"w1_a": (3, 4), "w1_b": (4, 2), "w2": (4, 5)}
RIGHT = {"w1": (3, 2), "w2_a": (4, 4), "w2_b": (4, 5)}
BOTH = {"w1_a": (3, 4), "w1_b": (4, 2), "w2_a": (4, 4), "w2_b": (4, 5)}


def kronecker(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    one, two = (
        parts[f"w{n}"].double() if f"w{n}" in parts else parts[f"w{n}_a"].double() @ parts[f"w{n}_b"].double()
        for n in (1, 2)
    )
    return torch.kron(one, two)


@pytest.mark.parametrize("shapes", [WHOLE, LEFT, RIGHT, BOTH])
def test_lokr_equals_formula(tmp_path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    parts = drawn(shapes)
    (update,) = read(tmp_path, {f"x.lokr_{k}": v for k, v in parts.items()}, peft_type="LOKR", r=4, alpha=6)
    assert facts(update) == ("x.weight", "lokr", True, False, False)
    assert update.fits((12, 10)) and not update.fits((10, 12))
    given = random(12, 10, seed=5)
    close(in_blocks(update, given, 5), given.double() + 1.5 * kronecker(parts))


def test_lokr_with_core_is_kronecker_product_of_channels(tmp_path: Path) -> None:
    shapes = {"w1": (3, 2), "w2_a": (4, 4), "w2_b": (4, 5), "t2": (4, 4, 3, 2)}
    parts = drawn(shapes)
    (update,) = read(tmp_path, {f"x.lokr_{k}": v for k, v in parts.items()}, peft_type="LOKR", r=4, alpha=6)
    wide = {k: v.double() for k, v in parts.items()}
    second = torch.einsum("ijkl,io,jc->ockl", wide["t2"], wide["w2_a"], wide["w2_b"])
    given = random(12, 10, 3, 2, seed=5)
    assert update.fits(tuple(given.shape)) and not update.fits((12, 10, 3, 3))
    exact = torch.einsum("ac,bdkl->abcdkl", wide["w1"], second).reshape(12, 10, 3, 2)
    close(in_blocks(update, given, 5), given.double() + 1.5 * exact)


def test_lokr_on_1d_kernel_equals_peft(tmp_path: Path) -> None:
    """torch.kron of a matrix and (out, in, kernel): the matrix's rows meet the channels, as PEFT trains it."""
    first, second = random(3, 2), random(4, 5, 3, seed=2)
    values = {"x.lokr_w1": first, "x.lokr_w2": second}
    (update,) = read(tmp_path, values, peft_type="LOKR", r=4, alpha=6)
    assert not update.row_wise((12, 10, 3)) and update.row_wise((12, 10)) and update.row_wise((12, 10, 3, 3))
    given = random(12, 10, 3, seed=5)
    product = torch.kron(first.double(), second.double()).reshape(given.shape)
    close(in_blocks(update, given), given.double() + 1.5 * product)


# --- AdaLoRA ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "scaling"), [(10, 10), (1, 1), (0.5, 0.5), (0, 6), (-3, 6)])
def test_adalora_scaling_is_alpha_over_initial_rank(tmp_path: Path, alpha: float, scaling: float) -> None:
    """PEFT: lora_alpha if it is positive, else init_r; over the initial rank."""
    a, b, e = random(6, 7), random(9, 6), random(6, 1)
    values = {"x.lora_A": a, "x.lora_B": b, "x.lora_E": e}
    (update,) = read(tmp_path, values, peft_type="ADALORA", init_r=6, lora_alpha=alpha)
    assert facts(update) == ("x.weight", "adalora", True, True, False)
    given = random(9, 7, seed=5)
    delta = b.double() @ (a.double() * e.double()) * scaling / (6 + 1e-5)
    close(in_blocks(update, given), given.double() + delta)


@pytest.mark.parametrize("name", ["x.lora_E", "x.lora_E.default", "x.default.lora_E"])
def test_adalora_mask_under_any_name_is_applied(tmp_path: Path, name: str) -> None:
    values = {"x.lora_A": random(2, 7), "x.lora_B": random(9, 2), "x.lora_E": random(2, 1)}
    settings = {"peft_type": "ADALORA", "init_r": 6, "lora_alpha": 6, "rank_pattern": {name: [True, False, True]}}
    (update,) = read(tmp_path, values, **settings)
    assert update.keys == ("x.lora_A", "x.lora_B", "x.lora_E")


@pytest.mark.parametrize(("name", "size"), [("h.0.c_fc", (9, 7)), ("h.0.c_proj", (7, 7)), ("head", (7, 7))])
def test_adalora_on_conv1d_is_transposed(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    """Told by the shape, and of a square weight by the architecture."""
    out, width = size
    a, b, e = random(4, width), random(out, 4), random(4, 1)
    values = {f"{name}.lora_A": a, f"{name}.lora_B": b, f"{name}.lora_E": e}
    (update,) = read(tmp_path, values, GPT2, peft_type="ADALORA", init_r=4, lora_alpha=4)
    delta = b.double() @ (a.double() * e.double()) * 4 / (4 + 1e-5)
    given = random(width, out, seed=5)
    close(in_blocks(update, given), given.double() + (delta if name == "head" else delta.T))


# --- what kinds say of themselves ---------------------------------------------------------------------------

PAIR = {"x.lora_A.weight": (4, 7), "x.lora_B.weight": (9, 4)}
LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}


@pytest.mark.parametrize(
    ("shapes", "settings", "expected"),
    [
        (PAIR, {}, ("lora", True, True)),
        ({"x.lora_embedding_A": (4, 7), "x.lora_embedding_B": (9, 4)}, {}, ("lora_embedding", True, True)),
        ({"x.lora_A.weight": (4, 7, 3), "x.lora_B.weight": (9, 4, 1)}, {}, ("lora_convolution", True, True)),
        (PAIR, {"init_lora_weights": "pissa"}, ("lora", False, False)),
        (PAIR | {"x.lora_magnitude_vector": (9,)}, {"use_dora": True}, ("dora", False, False)),
        (
            {"x.boft_R": (1, 2, 3, 3), "x.boft_s": (9, 1)},
            {"peft_type": "BOFT", "boft_n_butterfly_factor": 1},
            ("boft", False, False),
        ),
    ],
)
def test_kind_description_names_formula(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], settings: dict[str, Any], expected: tuple[str, bool, bool]
) -> None:
    (update,) = read(tmp_path, {k: random(*v) for k, v in shapes.items()}, **LORA | settings)
    assert facts(update) == ("x.weight", *expected, False)
    assert not update.tied


@pytest.mark.parametrize("init", [True, "pissa"])
def test_tied_weight_follows_configuration(tmp_path: Path, init: Any) -> None:
    values = {k: random(*v) for k, v in PAIR.items()}
    settings = LORA | {"ensure_weight_tying": True, "init_lora_weights": init}
    (update,) = read(tmp_path, values, **settings, target_modules=["x", "model.embed_tokens"])
    assert update.tied
    for other in (["x"], "x|embed_tokens.*", []):  # PEFT looks for two names, and passes over the setting
        (update,) = read(tmp_path, values, **settings, target_modules=other)
        assert update.tied == isinstance(other, str)


def test_decomposition_needs_whole_weight_and_copies(tmp_path: Path) -> None:
    (update,) = read(tmp_path, {k: random(*v) for k, v in PAIR.items()}, **LORA, init_lora_weights="olora")
    assert not update.row_wise((9, 7)) and update.copies == DECOMPOSITION
    loaded: Any = update.load((9, 7))
    given, whole = random(9, 7, seed=5).double(), slice(0, 9)
    # Between the weight and the result all is float64, so the two are all that rounding can be told by.
    close(loaded.terms(given, given.abs(), whole), given.abs() + loaded.apply(given, whole).abs())
    embedding = {"x.lora_embedding_A": random(4, 7), "x.lora_embedding_B": random(9, 4)}
    (update,) = read(tmp_path / "e", embedding, **LORA, init_lora_weights="olora")
    assert update.row_wise((7, 9)) and update.adds  # PEFT initialises embeddings in the plain way


def test_lora_bias_is_described(tmp_path: Path) -> None:
    values = {"x.lora_A.weight": random(4, 7), "x.lora_B.weight": random(9, 4), "x.lora_B.bias": random(9)}
    settings = {"peft_type": "LORA", "r": 9, "lora_alpha": 4, "lora_bias": True, "rank_pattern": {"x": 4}}
    settings["alpha_pattern"] = {"x": 6}
    update = next(u for u in read(tmp_path, values, **settings) if u.target == "x.bias")
    assert facts(update) == ("x.bias", "lora_bias", True, False, False)
    given = random(9, seed=5)
    close(in_blocks(update, given), given.double() + 1.5 * values["x.lora_B.bias"].double())
