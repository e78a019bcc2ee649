"""Spectra, selections and overlaps against numpy, on matrices of every awkward shape."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_export.deltas import largest, spectrum
from lora_export.deltas.largest import least_kept
from lora_export.deltas.mixing import agreed, summed
from lora_export.deltas.overlap import Overlap


def matrix(rows: int, columns: int, rank: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    left, right = torch.randn(rows, rank, generator=draw), torch.randn(rank, columns, generator=draw)
    return left.double() @ (right * torch.logspace(0, -2, rank)[:, None]).double()


@pytest.mark.parametrize(
    ("rows", "columns", "rank"), [(40, 30, 7), (30, 40, 7), (12, 12, 12), (5, 60, 5), (1, 9, 1)]
)
def test_spectrum_of_matrix_matches_numpy(rows: int, columns: int, rank: int) -> None:
    delta = matrix(rows, columns, rank)
    found, sizes = spectrum.of_matrix(delta), np.linalg.svd(delta.numpy(), compute_uv=False)
    assert np.allclose(found.sizes[:rank], sizes[:rank], rtol=1e-9)
    for k in range(1, rank + 1):
        left, right = found.factors(k)
        assert left.shape == (rows, k) and right.shape == (k, columns)
        lost = float((delta - left @ right).norm())
        assert lost == pytest.approx(float(np.sqrt((sizes[k:] ** 2).sum())), rel=1e-5, abs=1e-6)
        assert found.lost(k) == pytest.approx(float(np.sqrt((sizes[k:] ** 2).sum())), rel=1e-5, abs=1e-6)
        assert float(left.norm()) == pytest.approx(float(right.norm()))


@pytest.mark.parametrize(("rows", "columns", "rank"), [(40, 30, 7), (6, 40, 9), (40, 5, 8), (7, 7, 20)])
def test_spectrum_of_factors_matches_numpy(rows: int, columns: int, rank: int) -> None:
    draw = torch.Generator().manual_seed(3)
    left, right = (torch.randn(s, generator=draw).double() for s in ((rows, rank), (rank, columns)))
    found = spectrum.of_factors(left, right)
    sizes = np.linalg.svd((left @ right).numpy(), compute_uv=False)
    count = min(rows, columns, rank)
    assert np.allclose(found.sizes[:count], sizes[:count])
    rebuilt = found.left @ torch.diag(found.sizes) @ found.right
    assert torch.allclose(rebuilt, left @ right)


def test_spectrum_figures_match_definition() -> None:
    sizes = torch.tensor([4.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    found = spectrum.Spectrum(torch.eye(4).double(), sizes, torch.eye(4).double())
    assert found.norm == pytest.approx(21**0.5)
    assert found.energy.tolist() == pytest.approx([16 / 21, 20 / 21, 1, 1])
    assert [found.rank_for(s) for s in (0.5, 16 / 21, 0.9, 20 / 21, 0.99, 1.0)] == [1, 1, 2, 2, 3, 3]
    shares = np.array([4, 2, 1]) / 7
    assert found.effective_rank == pytest.approx(float(np.exp(-(shares * np.log(shares)).sum())))
    assert found.stable_rank == pytest.approx(21 / 16)
    none = spectrum.Spectrum(torch.zeros(4, 0), torch.zeros(0).double(), torch.zeros(0, 4))
    assert none.rank_for(0.9) == 0 and none.energy.tolist() == []


def test_spectrum_of_zero_delta_is_zero() -> None:
    found = spectrum.of_matrix(torch.zeros(4, 3))
    assert (found.norm, found.effective_rank, found.stable_rank) == (0, 0, 0)
    assert found.energy.tolist() == [1, 1, 1] and found.rank_for(0.9) == 1 and found.lost(0) == 0
    assert not torch.isnan(found.factors(2)[1]).any()


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=60),
    share=st.floats(0, 1),
    step=st.integers(1, 20),
)
def test_largest_matches_numpy(values: list[float], share: float, step: int) -> None:
    delta = torch.tensor(values, dtype=torch.float64)
    kept = int(share * len(values))
    runs = [(i, min(i + step, len(values))) for i in range(0, len(values), step)]
    least = least_kept(lambda a, b: delta[a:b], runs, kept, len(values))
    chosen = (delta.abs() >= least).numpy()
    order = np.sort(np.abs(values))[::-1]
    wanted = np.abs(values) >= order[kept - 1] if kept else np.zeros(len(values), dtype=bool)
    close = np.isclose(np.abs(values), order[kept - 1] if kept else 0, rtol=2.0**-39)  # as good as equal
    assert (chosen == wanted)[~close].all() and chosen[wanted].all()


def test_largest_threshold_lies_halfway() -> None:
    """So that sums in another order, which are off by a hair, choose the same elements."""
    steps = torch.tensor([8.0, -2, 4, 0, -1], dtype=torch.float64) / 4096
    delta = steps + steps.sign() + (steps == 0)  # of one key in the first pass

    def least(kept: int) -> float:
        return least_kept(lambda a, b: delta[a:b], [(0, 2), (2, 5)], kept, 5)

    halves = [1 + h / 4096 for h in (6, 3, 1.5, 0.5)]
    assert [least(k) for k in range(6)] == [float("inf"), *halves, 0]
    same = torch.tensor([1.0, 1, 1, 0.5], dtype=torch.float64)
    assert 1 - 1e-11 < least_kept(lambda a, b: same[a:b], [(0, 4)], 2, 4) < 1


def test_largest_of_equal_elements_keeps_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(largest, "FEW", 50)
    draw = torch.Generator().manual_seed(1)
    delta = 1 + torch.rand(1000, generator=draw).double() * 1e-3  # one key in the first pass
    order = delta.sort(descending=True).values
    runs = [(0, 400), (400, 1000)]
    least = least_kept(lambda a, b: delta[a:b], runs, 200, 1000)
    assert order[200] < least <= order[199]
    for kept in (1, 10, 500, 999):
        least = least_kept(lambda a, b: delta[a:b], runs, kept, 1000)
        assert order[kept] < least <= order[kept - 1]
    monkeypatch.setattr(largest, "FEW", 1)  # two passes, and then a single number
    many = torch.tensor([5.0, 4.9, 4.8, 1.0, 1.00001, 1.00002, 0.1], dtype=torch.float64)
    ordered = many.sort(descending=True).values
    for kept in range(1, 7):
        least = least_kept(lambda a, b: many[a:b], [(0, 3), (3, 7)], kept, 7)
        assert least == float(ordered[kept - 1]) * (1 - 2.0**-40), kept
    equal = torch.full((300,), 0.25, dtype=torch.float64)
    assert 0.2 < least_kept(lambda a, b: equal[a:b], [(0, 300)], 10, 300) <= 0.25


def test_mixing_sums_and_votes_match_hand_computation() -> None:
    one, two, three = (
        torch.tensor(v, dtype=torch.float64) for v in ([3.0, 0, -1, 2], [-1.0, 0, -2, 2], [-1.0, 5, 4, 0])
    )
    assert summed([one, two, three], [1, 0.5, -1]).tolist() == [3.5, -5, -6, 3]
    assert agreed([one, two, three], [1, 1, 1], "total").tolist() == [3, 5, 4, 2]
    assert agreed([one, two, three], [1, 1, 1], "frequency").tolist() == [-1, 5, -1.5, 2]
    assert agreed([one, two, three], [3, 1, 1], "total").tolist() == [9, 5, 4, 4]
    assert agreed([one, -one], [1, 1], "total").tolist() == [3, 0, 1, 2]  # a sum of zero elects plus


def test_mixing_needs_weight_per_delta() -> None:
    one = torch.tensor([1.0, -2], dtype=torch.float64)
    assert agreed([one], [0.5], "total").tolist() == [0.5, -1] == summed([one], [0.5]).tolist()
    for weights in ([1.0], [1.0, 1, 1]):
        with pytest.raises(ValueError, match="zip"):
            summed([one, one], weights)
        with pytest.raises(ValueError, match="zip"):
            agreed([one, one], weights, "total")


def test_overlap_sums_over_blocks() -> None:
    first, second = (torch.tensor(v).double() for v in ([3.0, 0, 1, 2], [-4.0, 1, 2, -1]))
    whole, blocks, joined = Overlap(), Overlap(), Overlap()
    whole.add(first, second)
    for rows in (slice(0, 2), slice(2, 4)):
        part = Overlap()
        part.add(first[rows], second[rows])
        blocks.add(first[rows], second[rows])
        joined.join(part)
    assert whole == blocks == joined == Overlap(dot=-12, first=14, second=22, both=3, conflicts=2)


def test_overlap_matches_hand_computation() -> None:
    overlap, other = Overlap(), Overlap()
    overlap.add(torch.tensor([3.0, 0]), torch.tensor([-4.0, 1]))
    other.add(torch.tensor([0.0, 4]), torch.tensor([0.0, 3]))
    overlap.join(other)
    assert overlap.cosine == pytest.approx((-12 + 12) / 5 / 26**0.5)
    assert overlap.sign_conflicts == 0.5
    assert overlap.norm_ratio == pytest.approx(5 / 26**0.5)
    assert (Overlap().cosine, Overlap().sign_conflicts, Overlap().norm_ratio) == (0, 0, None)
