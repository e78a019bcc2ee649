"""Float64 rounded to the type of the output, once."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_LOST = 2**29 - 1  # bits of a float64 number that fp32 has no room for


def round_once(values: "torch.Tensor", dtype: "torch.dtype") -> "torch.Tensor":
    """The nearest numbers of a type, ties to even.

    torch takes float64 to 16 bits by way of fp32, and so rounds twice. Here the way to fp32 rounds to odd: the last
    bit is 1 wherever something is lost, so that the next step sees on which side of a middle a number lies (Boldo
    and Melquiond, "Emulation of FMA and correctly rounded sums", 2008). Numbers below 2⁻¹²⁶ may round twice.
    """
    import torch

    if values.dtype != torch.float64 or dtype not in (torch.float16, torch.bfloat16):
        return values.to(dtype)
    exact = values.contiguous().view(torch.int64)
    odd = exact & _LOST
    odd += _LOST  # which carries into the last bit that stays
    odd |= exact
    odd &= ~_LOST
    return odd.view(torch.float64).float().to(dtype)
