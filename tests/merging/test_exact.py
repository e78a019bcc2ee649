"""The distance of the numbers of a type, against exponents that frexp gives, and numbers where zero is exact."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_export.merging.running.exact import Errors, ExactTensor, ulp

KINDS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
def test_ulp_of_numbers_of_every_size_is_power_of_two_below_them(kind: str) -> None:
    numbers = torch.randn(64, dtype=torch.float64).outer(2.0 ** torch.arange(-300, 120, dtype=torch.float64))
    numbers = numbers.reshape(-1)[numbers.reshape(-1) != 0]
    info = torch.finfo(KINDS[kind])
    expected = torch.ldexp(torch.full_like(numbers, info.eps), torch.frexp(numbers).exponent - 1)
    assert torch.equal(ulp(numbers, kind), expected.clamp(min=info.eps * info.tiny))


@pytest.mark.parametrize("written", [2.0**-12, -(2.0**-9), 1e-30])
def test_judge_of_number_where_float64_gives_zero_is_beyond(written: float) -> None:
    tensor: Any = SimpleNamespace(_tensor=SimpleNamespace(output=SimpleNamespace(dtype="BF16")))
    rows, zeros, errors = torch.tensor([0.0, written]).bfloat16(), torch.zeros(2).double(), Errors()
    found = ExactTensor._judge_some(tensor, errors, rows, zeros, slice(0, 2), lambda: zeros)
    assert (found, errors.beyond, errors.checked) == (1, 1, 2)
