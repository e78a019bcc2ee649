"""What of a change survives rounding, as a formula; test_bytes_and_survival has it in whole merges."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_export.merging.running.survival import SAMPLE, SPARSEST, Survival, sampled, stride


def test_survival_sums_over_blocks() -> None:
    before = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    after = before + torch.tensor([0.5, 0.001, -1.0, 0.01], dtype=torch.float64)
    rounded = after.to(torch.bfloat16)  # steps of 1/128, 1/64, 1/64 and 1/16: the small changes are lost
    assert (rounded.double() - before).tolist() == [0.5, 0, -1, 0]
    whole, blocks, joined = Survival(), Survival(), Survival()
    whole.add(before, after, rounded)
    for rows in (slice(0, 1), slice(1, 3), slice(3, 4)):
        part = Survival()
        part.add(before[rows], after[rows], rounded[rows])
        blocks.add(before[rows], after[rows], rounded[rows])
        joined.join(part)
    delta = 0.25 + 1e-6 + 1 + 1e-4
    for found in (whole, blocks, joined):
        assert (found.kept, found.delta, found.weight) == pytest.approx((1.25, delta, 85))
        assert found.share == pytest.approx(1.25 / delta)
        assert found.relative_delta == pytest.approx((delta / 85) ** 0.5)


def test_survival_without_rounding_is_one() -> None:
    before, after = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.5, 1.0]])
    found = Survival()
    for _ in range(2):
        found.add(before, after, after)
    assert (found.kept, found.delta, found.weight, found.share) == (2.5, 2.5, 10, 1)


def test_survival_of_no_change_is_none() -> None:
    found = Survival()
    found.add(torch.zeros(2), torch.zeros(2), torch.zeros(2, dtype=torch.float16))
    assert found.share is None and found.relative_delta is None


def test_survival_samples_one_row_in_32_of_large_tensors() -> None:
    assert stride((3, 5)) == 1 == stride((2, SAMPLE - 1)) == stride((SAMPLE,))
    assert stride((2, SAMPLE)) == 2 and stride((10, SAMPLE)) == 10
    assert stride((4096, 4096)) == SPARSEST == 32


@given(rows=st.integers(1, 300), columns=st.sampled_from([1, 700, SAMPLE // 8, SAMPLE]), data=st.data())
def test_survival_sample_does_not_depend_on_blocks(rows: int, columns: int, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, rows), max_size=8)) | {0, rows})
    seen = []
    for start, stop in itertools.pairwise(cuts):
        part = sampled((rows, columns), start, stop - start)
        if part is not None:
            assert list(range(start, stop)[part]), "a block without such rows is not looked at"
            seen += range(start, stop)[part]
    assert seen == list(range(0, rows, stride((rows, columns))))
