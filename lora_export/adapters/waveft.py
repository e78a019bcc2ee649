"""WaveFT (arXiv:2505.12532, §3): W' = W + s·(inverse wavelet transform of n coefficients drawn by a seed)."""

import importlib
from dataclasses import dataclass
from typing import Any

import torch

from lora_export.adapters import fourierft
from lora_export.adapters.fourierft import seed_of
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.module import AdaptedModule, complete
from lora_export.adapters.sparse import PatchUpdate, SparseUpdate, first_permuted
from lora_export.adapters.updates import SizedTarget
from lora_export.contracts import TargetUpdate, Update

NAME = "WaveFT"
FORMULA = "W + s·(one level of the inverse wavelet transform of a sparse matrix, or the matrix itself)"

_MARKER = "waveft_spectrum"
Filters = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Settings(fourierft.Settings):
    """use_idwt: the trained numbers are wavelet coefficients, else elements of the weight."""

    use_idwt: bool
    wavelet_family: str | None = None


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each layer: linear, or GPT-2's Conv1D. How many coefficients it has, its tensor tells."""
    file.refuse_factor(NAME)
    settings = file.settings(Settings)
    filters = _filters(file, settings.wavelet_family) if settings.use_idwt else None
    return [_update(module, settings.scaling, filters) for module in complete(file, _MARKER)]


def _filters(file: AdapterFile, family: str | None) -> Filters:
    """The low-pass and the high-pass of reconstruction, of even length, from PEFT's own table of families.

    PEFT names more families than it has filters for, and pads the weight for another length than coif5 has: with
    those it cannot train.
    """
    padding: Any = importlib.import_module("peft.tuners.waveft.constants").WAVELET_REDUCTIONS
    known: Any = importlib.import_module("peft.tuners.waveft.wavelet")
    if family in padding and family in known.wavelist():
        wavelet = known.Wavelet(family)
        low, high = tuple(wavelet.rec_lo), tuple(wavelet.rec_hi)
        if padding[family] == (len(low) - 2, len(low) - 2) and len(low) == len(high):
            return low, high
    raise file.refuse(
        f"wavelet_family is {family!r}", expected="a family that PEFT has filters of, such as db1, sym4 or coif2"
    )


def _update(module: AdaptedModule, scaling: float, filters: Filters | None) -> TargetUpdate:
    (count,) = module.file.shape(module.keys[_MARKER], 1)
    flips, seed = module.is_conv1d, seed_of(module.file)

    def load(shape: tuple[int, ...]) -> Update:
        values = scaling * module.read(_MARKER)
        height, width = reversed(shape) if flips else shape
        places = first_permuted(seed, height * width, count)
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

    return SizedTarget(module.weight, "waveft", module.used, ((None, None),), load, adds=True, least=count)


def _place(place: torch.Tensor, size: int, taps: int) -> tuple[torch.Tensor, torch.Tensor]:
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
