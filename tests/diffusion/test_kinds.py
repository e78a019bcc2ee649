"""Each kind in fp32 against the bound of certificates, in pieces, in other shapes; and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_export.adapters.diffusion.kinds import kind_of
from lora_export.adapters.diffusion.pieces import FusedTarget, refuse_changed
from lora_export.adapters.kind import float64
from lora_export.adapters.updates import LowRankUpdate, terms_of
from lora_export.contracts import Adapter
from lora_export.contracts.pipelines import Piece
from lora_export.errors import AdapterError
from tests.diffusion.modules import ALL, IN, KERNEL, LAYER, OUT, Case, Tensors, applied, case, made, normal


@pytest.mark.parametrize(("kind", "kernel"), ALL)
def test_updates_in_fp32_by_blocks_of_rows_are_within_the_certificates_bound(
    kind: str, kernel: tuple[int, ...], tmp_path: Path
) -> None:
    adapted = case(kind, kernel, tmp_path)
    exact = adapted.merged()
    for update in adapted.updates():
        weight = adapted.base[update.target]
        assert not update.adds or update.row_wise(tuple(weight.shape))
        step = 7 if update.row_wise(tuple(weight.shape)) else None
        got = applied(update, weight.clone(), wide=False, step=step)
        with float64():
            loaded = update.load(tuple(weight.shape))
        wide = weight.double()
        terms = terms_of(loaded, wide.clone(), wide.abs(), slice(0, len(wide)))
        off = (got.double() - exact[update.target]).abs()
        assert (off <= 2.0**-20 * terms).all()
        assert torch.equal(applied(update, wide.clone(), step=step), exact[update.target]) or step
        assert (terms * (1 + 1e-9) >= exact[update.target].abs()).all()
        assert not torch.equal(exact[update.target], wide)
        assert isinstance(loaded, LowRankUpdate) == update.low_rank


FUSED = (
    Piece("block.q", (0, 20)), Piece("block.k", (20, 28)), Piece("block.v", (28, OUT), swap=True)
)  # fmt: skip
ORDER = (
    *range(28),
    *range(38, 48),
    *range(28, 38),
)  # row of the trained weight for each of q, k and v below each other


@pytest.mark.parametrize(("kind", "kernel"), ALL)
def test_pieces_of_a_fused_weight_are_the_rows_of_the_fused_result(
    kind: str, kernel: tuple[int, ...], tmp_path: Path
) -> None:
    whole = case(kind, kernel, tmp_path)
    split: Tensors = {}
    for leaf in ("weight", "bias"):
        rows = torch.stack([whole.base[f"{LAYER}.{leaf}"][row] for row in ORDER])
        split |= {
            f"{piece.module}.{leaf}": part for piece, part in zip(FUSED, rows.split((20, 8, 20)), strict=True)
        }
    expected = whole.merged()
    parts = case(kind, kernel, tmp_path, base=split, pieces=FUSED)
    merged = parts.merged()
    for leaf in ("weight", "bias"):
        got = torch.cat([merged[f"{piece.module}.{leaf}"] for piece in FUSED])
        assert torch.allclose(
            got.double(), expected[f"{LAYER}.{leaf}"][list(ORDER)].double(), rtol=1e-12, atol=1e-12
        )
    for update in parts.updates():
        weight, row_wise = split[update.target], update.row_wise(tuple(split[update.target].shape))
        exact = merged[update.target]
        got = applied(update, weight.clone(), wide=False, step=3 if row_wise else None).double()
        with float64():
            loaded = update.load(tuple(weight.shape))
        assert isinstance(loaded, LowRankUpdate) == update.low_rank
        terms = terms_of(loaded, weight.double(), weight.double().abs(), slice(0, len(weight)))
        assert ((got - exact).abs() <= 2.0**-20 * terms).all()


POINTS = ("lora", "dora", "dora_in", "loha", "lokr", "glora", "full", "ia3", "ia3_in", "set")


@pytest.mark.parametrize("kind", POINTS)
def test_kernel_of_one_point_and_matrix_are_the_same(kind: str, tmp_path: Path) -> None:
    matrix = case(kind, (), tmp_path).merged()[f"{LAYER}.weight"]
    flat = normal(99)(OUT, IN)
    point = {f"{LAYER}.weight": flat[:, :, None, None], f"{LAYER}.bias": torch.zeros(OUT)}
    onto_point = case(kind, (), tmp_path, base=point).merged()[f"{LAYER}.weight"]
    assert torch.equal(onto_point, matrix[:, :, None, None])
    tensors = made(kind)
    if not kind.startswith("ia3"):
        kernels = {
            k: v[:, :, None, None] for k, v in tensors.items() if v.dim() == 2 and k[:4] not in ("hada", "lokr")
        }
        onto_matrix = case(kind, (), tmp_path, tensors=tensors | kernels).merged()[f"{LAYER}.weight"]
        assert torch.equal(onto_matrix, matrix)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (0.0, 1.0), (6.0, 2.0)])
def test_scale_is_alpha_by_rank_and_one_without_alpha(alpha: float | None, scale: float, tmp_path: Path) -> None:
    tensors = {k: v for k, v in made("lora").items() if k != "alpha"}
    if alpha is not None:
        tensors["alpha"] = torch.tensor(alpha)
    adapted = case("lora", (), tmp_path, tensors=tensors, weight=0.25)
    delta = tensors["lora_up"].double() @ tensors["lora_down"].double()
    expected = adapted.base[f"{LAYER}.weight"].double() + 0.25 * scale * delta
    assert torch.allclose(adapted.merged()[f"{LAYER}.weight"], expected, rtol=0, atol=1e-15)


def test_lokr_of_whole_factors_has_no_scale(tmp_path: Path) -> None:
    tensors = made("lokr_whole") | {"alpha": torch.tensor(1e6)}
    adapted = case("lokr_whole", (), tmp_path, tensors=tensors)
    delta = torch.kron(tensors["lokr_w1"].double(), tensors["lokr_w2"].double())
    expected = adapted.base[f"{LAYER}.weight"].double() + delta
    assert torch.equal(adapted.merged()[f"{LAYER}.weight"], expected)


def test_lokr_of_a_whole_second_factor_has_the_rank_of_the_first(tmp_path: Path) -> None:
    tensors = made("lokr_both") | {"alpha": torch.tensor(3.0)}
    adapted = case("lokr_both", (), tmp_path, tensors=tensors)
    first = tensors["lokr_w1_a"].double() @ tensors["lokr_w1_b"].double()
    expected = adapted.base[f"{LAYER}.weight"].double() + 3.0 / 2 * torch.kron(first, tensors["lokr_w2"].double())
    assert torch.allclose(adapted.merged()[f"{LAYER}.weight"], expected, rtol=0, atol=1e-14)


def test_glora_of_old_files_has_its_factors_the_other_way_round(tmp_path: Path) -> None:
    new = made("glora")
    old = {"a1": new["a2"], "a2": new["a1"], "b1": new["b2"], "b2": new["b1"], "alpha": new["alpha"]}
    expected = case("glora", (), tmp_path).merged()[f"{LAYER}.weight"]
    assert torch.equal(case("glora", (), tmp_path, tensors=old).merged()[f"{LAYER}.weight"], expected)


def test_bias_beside_a_product_is_added_as_it_is(tmp_path: Path) -> None:
    tensors = made("lora") | {"diff_b": normal(7)(OUT)}
    adapted = case("lora", (), tmp_path, tensors=tensors, weight=0.5)
    merged = adapted.merged()[f"{LAYER}.bias"]
    assert torch.equal(merged, adapted.base[f"{LAYER}.bias"].double() + 0.5 * tensors["diff_b"].double())


def test_bare_parameter_is_changed_under_its_own_name(tmp_path: Path) -> None:
    value, table = normal(3)(1, 6, IN), normal(4)(1, 6, IN)
    pieces = (Piece("block.scale_shift_table", bare=True),)
    base = {"block.scale_shift_table": table}
    for part in ("diff_m", "diff"):
        merged = Case({part: value}, base, pieces).open(tmp_path).merged()
        assert torch.equal(merged["block.scale_shift_table"], table.double() + value.double())


REFUSED: dict[str, tuple[Tensors, dict[str, Any], str]] = {
    "rank": (made("lora") | {"lora_up": torch.ones(OUT, 4)}, {}, "the shapes do not match"),
    "base": (made("lora", inputs=IN + 1), {}, r"\[48, 21\].*has \[48, 20\]"),
    "rows": (made("loha", out=OUT + 4), {}, r"\[52, 20\].*has \[48, 20\]"),
    "half": ({"lora_up": torch.ones(OUT, 4)}, {}, "lora_down of lora_x is missing"),
    "half a factor": (
        {k: v for k, v in made("lokr").items() if k != "lokr_w2_a"}, {}, "w2 of LoKr is there in half"
    ),
    "two kinds": (made("lora") | made("loha"), {}, "parts of lora and of loha"),
    "no kind": ({"alpha": torch.tensor(1.0)}, {}, "no kind of adapter"),
    "odd part": (made("lora") | {"rescale": torch.ones(OUT, 1)}, {}, "lora and of oft"),
    "part of another": (made("glora") | {"dora_scale": torch.ones(OUT, 1)}, {}, "beside parts of glora"),
    "two scales": (made("dora") | {"magnitude": torch.ones(OUT)}, {}, "beside parts of lora"),
    "bias in DoRA": (made("dora") | {"lora_up_bias": torch.ones(OUT)}, {}, "beside parts of lora"),
    "DoRA of neither": (made("lora") | {"dora_scale": torch.ones(IN, 1)}, {}, "neither outputs nor inputs"),
    "DoRA of a line": (made("lora") | {"dora_scale": torch.ones(OUT)}, {}, "neither outputs nor inputs"),
    "one by one": (
        {"lora_down": torch.ones(1, 1), "lora_up": torch.ones(1, 1), "dora_scale": torch.ones(1, 1)},
        {"base": {f"{LAYER}.weight": torch.ones(1, 1)}}, "outputs as well as for inputs",
    ),
    "GLoRA of both": (
        dict.fromkeys(("a1", "a2", "b1", "b2"), torch.ones(4, 4)),
        {"base": {f"{LAYER}.weight": torch.ones(4, 4)}}, "right in both orders",
    ),
    "GLoRA of neither": (made("glora") | {"a1": torch.ones(3, 3)}, {}, "in neither order"),
    "on_input": (made("ia3") | {"on_input": torch.tensor(2)}, {}, "on_input"),
    "IA3 of another size": (made("ia3") | {"weight": torch.ones(OUT - 1)}, {}, r"has \[48, 20\]"),
    "blocks": ({"oft_blocks": torch.ones(4, 8, 6)}, {}, "oft_blocks"),
    "one block": ({"oft_blocks": torch.ones(8, 8)}, {}, "oft_blocks"),
    "butterfly": ({"oft_blocks": torch.ones(3, 6, 8, 8)}, {}, "multiple of 2"),
    "rescale": (made("oft") | {"rescale": torch.ones(OUT - 1, 1)}, {}, "the shapes do not match"),
    "no bias": (made("full"), {"base": {f"{LAYER}.weight": torch.ones(OUT, IN)}}, f"no {LAYER}.bias"),
    "no weight": (made("ia3"), {"pieces": (Piece("other"),)}, "no other.weight"),
    "control": (
        made("lora", inputs=2 * IN) | {"reshape_weight": torch.tensor([OUT, 2 * IN])}, {},
        "other inputs than its class",
    ),
    "rows that nobody has": (
        made("dora_in"), {"pieces": (Piece(LAYER, (0, 20)),), "base": {f"{LAYER}.weight": torch.ones(20, IN)}},
        "all 48 rows",
    ),
    "odd halves": (
        made("lora", out=5), {"pieces": (Piece(LAYER, swap=True),), "base": {f"{LAYER}.weight": torch.ones(5, IN)}},
        r"has \[5, 20\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused(name: str, tmp_path: Path) -> None:
    tensors, changes, said = REFUSED[name]
    with pytest.raises(AdapterError, match=said):
        case("lora", (), tmp_path, tensors=tensors, **changes).updates()


NO_SUMS = ("dora", "dora_in", "loha_dora_in", "lokr_dora", "full_dora", "magnitude", "ia3", "set", "oft", "boft")


@pytest.mark.parametrize("kind", NO_SUMS)
def test_factor_of_what_is_no_sum_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"weight is 0\.5"):
        case(kind, (), tmp_path, weight=0.5).updates()


def test_kind_is_said_by_the_parts() -> None:
    def of(kind: str, kernel: tuple[int, ...] = ()) -> str:
        return kind_of(Case(made(kind, kernel=kernel), {}).module)

    assert [of(k) for k in ("lora", "loha", "lokr_both", "glora", "full", "set", "ia3", "oft")] == [
        "lora", "loha", "lokr", "glora", "full", "set", "ia3", "oft",
    ]  # fmt: skip
    decomposed = [of(k) for k in ("dora", "magnitude", "lokr_dora", "full_dora")]
    assert decomposed == ["dora", "dora", "lokr_dora", "full_dora"]
    assert of("lora_tucker", KERNEL) == "lora_tucker"
    assert kind_of(Case({"diff_b": torch.ones(2)}, {}).module) == "bias"
    assert kind_of(Case({"w_norm": torch.ones(2), "b_norm": torch.ones(2)}, {}).module) == "norm"
    assert kind_of(Case({"diff_m": torch.ones(2)}, {}).module) == "parameter"


@pytest.mark.parametrize(
    ("kind", "zero"),
    [
        ("lora", "lora_up"), ("loha", "hada_w2_a"), ("lokr", "lokr_w2_b"), ("ia3", "weight"),
        ("oft_wide", "oft_blocks"), ("glora", "a2 b2"), ("full", "diff diff_b"),
    ],
)  # fmt: skip
def test_module_of_zeros_changes_nothing(kind: str, zero: str, tmp_path: Path) -> None:
    tensors = made(kind)
    zeros = {name: torch.zeros_like(tensors[name]) for name in zero.split()}
    adapted = case(kind, (), tmp_path, tensors=tensors | zeros)
    for name, value in adapted.merged(wide=False).items():
        assert torch.equal(value, adapted.base[name])


def test_parts_say_which_weights_they_are_computed_with(tmp_path: Path) -> None:
    pieces = (Piece("block.q", (0, 24)), Piece("block.k", (24, OUT)))
    base = {
        f"{piece.module}.{leaf}": normal(5)(*shape)
        for piece in pieces
        for leaf, shape in (("weight", (24, IN)), ("bias", (24,)))
    }

    def besides(kind: str) -> list[tuple[str, ...]]:
        updates = case(kind, (), tmp_path, pieces=pieces, base=base).updates()
        return [u.beside for u in updates if isinstance(u, FusedTarget)]

    assert besides("lora") == besides("dora") == besides("glora") == besides("oft") == [(), ()]
    assert besides("oft_wide") == besides("boft") == [("block.k.weight",), ("block.q.weight",)]
    assert besides("dora_in") == [("block.q.weight", "block.k.weight")] * 2


def test_part_of_a_weight_that_an_earlier_adapter_changed_is_refused(tmp_path: Path) -> None:
    pieces = (Piece("block.q", (0, 24)), Piece("block.k", (24, OUT)))
    base = {f"{piece.module}.weight": normal(5)(24, IN) for piece in pieces}

    def adapter(kind: str, **changes: Any) -> Adapter:
        updates = case(kind, (), tmp_path, **{"pieces": pieces, "base": base, **changes}).updates()
        return Adapter(tmp_path, "kohya", {}, tuple(updates), {})

    earlier = adapter("lora", tensors=made("lora", out=24), pieces=(Piece("block.k"),))
    for kind in ("lora", "dora", "oft"):
        refuse_changed(adapter(kind), [earlier])
    for kind in ("dora_in", "boft"):
        refuse_changed(adapter(kind), [])
        with pytest.raises(AdapterError, match=r"with block\.k\.weight, which an adapter before"):
            refuse_changed(adapter(kind), [earlier])


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "glora"])
def test_scalar_that_was_not_multiplied_in_is_a_factor(kind: str, tmp_path: Path) -> None:
    half = case(kind, (), tmp_path, weight=0.5).merged()[f"{LAYER}.weight"]
    beside = case(kind, (), tmp_path, tensors=made(kind) | {"scalar": torch.tensor(0.5)})
    assert torch.equal(beside.merged()[f"{LAYER}.weight"], half)


def test_constraint_above_the_norm_of_a_rotation_does_nothing(tmp_path: Path) -> None:
    free, far = ({"oft_blocks": made("oft")["oft_blocks"], "alpha": torch.tensor(a)} for a in (0.0, 100.0))
    expected = case("oft", (), tmp_path, tensors=free).merged()[f"{LAYER}.weight"]
    assert torch.equal(case("oft", (), tmp_path, tensors=far).merged()[f"{LAYER}.weight"], expected)
