"""WaveFT (arXiv:2505.12532, §3): W' = W + s·(inverse wavelet transform of n coefficients drawn by a seed)."""

import importlib
from typing import TYPE_CHECKING, Any

from lora_export.adapters.complete import SizedTarget, refuse_factor
from lora_export.adapters.config import number
from lora_export.adapters.fourierft import seed_of
from lora_export.adapters.keys import group
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.sparse import PatchUpdate, SparseUpdate, chosen
from lora_export.contracts import TargetUpdate, Update

if TYPE_CHECKING:
    import torch

NAME = "WaveFT"
PEFT_TYPES = ("WAVEFT",)
FORMULA = "W + s·(one level of the inverse wavelet transform of a sparse matrix, or the matrix itself)"

_MARKER = "waveft_spectrum"
Filters = tuple[tuple[float, ...], tuple[float, ...]]


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each layer: linear, or GPT-2's Conv1D. How many coefficients it has, its tensor tells."""
    modules = group(file.tensors, (_MARKER,))
    if not modules:
        return []
    refuse_factor(file, NAME)
    transformed = file.config.get("use_idwt")
    if not isinstance(transformed, bool):
        raise file.refuse(f"use_idwt is {transformed!r}", expected="true or false, as PEFT writes it")
    filters = _filters(file) if transformed else None
    return [_update(file, name, keys[_MARKER], filters) for name, keys in modules.items()]


def _filters(file: AdapterFile) -> Filters:
    """The low-pass and the high-pass of reconstruction, of even length, from PEFT's own table of families.

    PEFT names more families than it has filters for, and pads the weight for another length than coif5 has: with
    those it cannot train.
    """
    family = file.config.get("wavelet_family")
    padding: Any = importlib.import_module("peft.tuners.waveft.constants").WAVELET_REDUCTIONS
    known: Any = importlib.import_module("peft.tuners.waveft.wavelet")
    if isinstance(family, str) and family in padding and family in known.wavelist():
        wavelet = known.Wavelet(family)
        low, high = tuple(wavelet.rec_lo), tuple(wavelet.rec_hi)
        if padding[family] == (len(low) - 2, len(low) - 2) and len(low) == len(high):
            return low, high
    raise file.refuse(
        f"wavelet_family is {family!r}", expected="a family that PEFT has filters of, such as db1, sym4 or coif2"
    )


def _update(file: AdapterFile, name: str, key: str, filters: Filters | None) -> TargetUpdate:
    (count,) = file.shape(key, 1)
    flips, seed = file.is_conv1d(name), seed_of(file)
    scaling = number(file.config, "scaling", file.where)

    def load(shape: tuple[int, ...]) -> Update:
        import torch

        values = scaling * file.read(key)
        height, width = reversed(shape) if flips else shape
        places = chosen(seed, height * width, count)
        row, column = places // width, places % width
        if filters is None:
            return SparseUpdate(*((column, row) if flips else (row, column)), values)
        (tops, high_row), (lefts, high_column) = (
            _place(p, size, len(filters[0])) for p, size in ((row, height), (column, width))
        )
        bank = torch.tensor(filters, dtype=torch.float64).to(values.dtype)
        # PEFT's quadrant of high columns has the high-pass along the rows, and the other way round.
        down, across = values[:, None] * bank[high_column], bank[high_row]
        return PatchUpdate(lefts, tops, across, down) if flips else PatchUpdate(tops, lefts, down, across)

    return SizedTarget(f"{name}.weight", "waveft", (key,), ((None, None),), load, adds=True, least=count)


def _place(place: "torch.Tensor", size: int, taps: int) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Along one axis of `size`: where the answer to a coefficient begins, and whether it is of the second half.

    The axis is padded by taps − 2, and by one more to be even; the coefficients lie in its middle. Coefficient k of
    a half answers from 2k; taps − 2 are cut off in front, and half of what the padding left over.
    """
    padded = size + taps - 2
    padded += padded % 2
    half = padded // 2
    place = place + (padded - size) // 2
    cut = (padded - taps + 2 - size) // 2
    return 2 * (place % half) - (taps - 2) - cut, place // half
