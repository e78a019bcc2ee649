"""Float64 rounded to the type of the output, once."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_LOST = 2**29 - 1  # bits of a float64 number that fp32 has no room for
_PIECE = 2**16  # numbers that a cache holds


def round_once(values: "torch.Tensor", dtype: "torch.dtype") -> "torch.Tensor":
    """The nearest numbers of a type, ties to even.

    torch takes float64 to 16 bits by way of fp32, and so rounds twice. Here the way to fp32 rounds to odd: the last
    bit is 1 wherever something is lost, so that the next step sees on which side of a middle a number lies (Boldo
    and Melquiond, "Emulation of FMA and correctly rounded sums", 2008). Numbers below 2⁻¹²⁶ may round twice.
    """
    import torch

    if values.dtype != torch.float64 or dtype not in (torch.float16, torch.bfloat16):
        return values.to(dtype)
    exact = values.reshape(-1).view(torch.int64)
    rounded = torch.empty(len(exact), dtype=dtype, device=values.device)
    odd = exact.new_empty(min(len(exact), _PIECE))
    for start in range(0, len(exact), _PIECE):
        some = exact[start : start + _PIECE]
        kept = torch.bitwise_and(some, _LOST, out=odd[: len(some)])
        kept += _LOST  # which carries into the last bit that stays
        kept |= some
        kept &= ~_LOST
        rounded[start : start + _PIECE] = kept.view(torch.float64).float()
    return rounded.reshape(values.shape)
