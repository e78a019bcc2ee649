"""Float64 rounded to 16 bits once, against arithmetic on the exponents."""

import pytest
import torch

from lora_export.merging.running.rounding import round_once
from tests.diffusion.test_formats import rounded


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_round_once_of_values_near_middles_is_nearest(dtype: torch.dtype) -> None:
    """Middles of two numbers of the type, moved by less than fp32 can tell; small and subnormal ones, and signs."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(4000, generator=generator, dtype=torch.float64) * 2.0 ** torch.randint(
        -30, 3, (4000,), generator=generator
    )
    numbers = torch.cat([numbers, torch.arange(1, 10) * 2.0**-25])
    stored = rounded(numbers, dtype)
    above = torch.nextafter(stored.float(), torch.tensor(torch.inf)) if dtype == torch.float32 else stored.clone()
    if dtype != torch.float32:
        above.view(torch.int16).add_(1)
    middles = (stored.double() + above.double()) / 2
    moved = torch.cat([middles * (1 + step * 2.0**-40) for step in (-1, 0, 1)])
    for values in (numbers, stored.double(), moved):
        assert torch.equal(round_once(values, dtype), rounded(values, dtype))
    once = round_once(moved, dtype)
    assert dtype == torch.float32 or not torch.equal(once, moved.to(dtype))  # which goes by way of fp32


def test_round_once_of_infinite_values_keeps_them() -> None:
    odd = torch.tensor([[torch.inf, -torch.inf], [torch.nan, 1e39], [0.0, -0.0]], dtype=torch.float64)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(round_once(odd, dtype).nan_to_num(7), odd.to(dtype).nan_to_num(7))
