"""Whether all numbers are finite: checked for gigabytes, so a yes has to be cheap."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def all_below(values: "torch.Tensor", limit: float) -> bool:
    """Whether nothing in an fp32 tensor is NaN, infinite or as large as `limit`; False if that takes a closer look.

    A sum of squares cannot cancel, and takes a thirtieth of the time of isfinite.
    """
    import torch

    flat = values.reshape(-1)
    return math.sqrt(float(torch.dot(flat, flat))) < limit
