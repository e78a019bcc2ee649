"""Every naming and kind merged: all tensors used, exact sums rounded once, everything else byte for byte."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lora_export.api import merge, verify
from lora_export.contracts import AdapterChoice, VerifyOptions
from tests.daily import daily
from tests.diffusion.cases import CASES, Case
from tests.diffusion.conftest import Bases
from tests.diffusion.files import Made, Weights, make

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BITS = {
    torch.float32: (24, -149),
    torch.bfloat16: (8, -133),
    torch.float16: (11, -24),
}  # significand, least exponent
IDENTICAL = 0.9999
DAILY = [
    ("sd15 kohya, mixed ranks and alphas", "bf16"),
    ("sd15 everything", "fp16"),
    ("sdxl kohya, half of the modules", "fp16"),
    ("sd3 kohya", "bf16"),
    ("sd3 LoKr", "fp32"),
    ("flux kohya", "fp32"),
    ("flux BFL", "bf16"),
    ("flux XLabs", "fp16"),
]


def rounded(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 rounded once, ties to even; torch would round to fp32 first."""
    bits, least = BITS[dtype]
    _, exponent = torch.frexp(exact)
    unit = torch.clamp(exponent - bits, min=least)
    return torch.ldexp(torch.round(torch.ldexp(exact, -unit)), unit).to(dtype)


def ulps(found: Tensor, wanted: Tensor) -> Tensor:
    """How many numbers of the type lie between them."""
    whole = torch.int32 if found.dtype == torch.float32 else torch.int16

    def ordered(values: Tensor) -> Tensor:
        as_int = values.contiguous().view(whole).long()
        return torch.where(as_int < 0, -(as_int & torch.iinfo(whole).max), as_int)

    return (ordered(found) - ordered(wanted)).abs()


def read(folder: Path) -> Weights:
    found: Weights = {}
    for file in sorted(folder.glob("*/*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors = {n: opened.get_tensor(n) for n in opened.keys()}  # noqa: SIM118
            found.setdefault(file.parent.name, {}).update(tensors)
    return found


def check_merged(base: Path, merged: Path, made: Made) -> None:
    """Exact where the adapter trained, byte for byte elsewhere."""
    before, after = read(base), read(merged)
    assert {c: set(t) for c, t in before.items()} == {c: set(t) for c, t in after.items()}
    off = total = worst = 0
    for component, tensors in before.items():
        expected = made.expected.get(component, {})
        for name, value in tensors.items():
            found = after[component][name]
            assert (found.dtype, found.shape) == (value.dtype, value.shape)
            if name not in expected:
                assert torch.equal(found, value), f"{component}: {name} is changed"
                continue
            apart = ulps(found, rounded(expected[name], value.dtype))
            off, total, worst = off + int((apart > 0).sum()), total + apart.numel(), max(worst, int(apart.max()))
            assert worst <= 1, f"{component}: {name} is {worst} numbers away"
    assert off <= (1 - IDENTICAL) * total, f"{off} of {total} weights are not the exact sum rounded once"


def check_untouched(base: Path, merged: Path, made: Made) -> None:
    for path in (p for p in base.rglob("*") if p.is_file()):
        if path.relative_to(base).parts[0] not in made.expected:
            assert (merged / path.relative_to(base)).read_bytes() == path.read_bytes(), path


def tried(case: Case, dtype: torch.dtype, bases: Bases, folder: Path) -> None:
    base = bases(case.family, dtype)
    path = folder / ("adapter" if case.naming == "peft" else "adapter.safetensors")
    made = make(path, base, case.family, case.naming, case.plan)
    choice = AdapterChoice(made.path, case.plan.strength)
    result = merge(base, [choice], folder / "merged")
    assert result.adapter_tensors == {"used": made.tensors, "total": made.tensors}
    assert set(result.components) == set(made.expected)
    check_merged(base, folder / "merged", made)
    check_untouched(base, folder / "merged", made)
    assert verify(folder / "merged", base, [choice], VerifyOptions()).verified


@pytest.mark.parametrize("name,dtype", daily([(n, d) for n in CASES for d in DTYPES], DAILY))
def test_merge_of_a_format_is_exact(name: str, dtype: str, bases: Bases, tmp_path: Path) -> None:
    tried(CASES[name], DTYPES[dtype], bases, tmp_path)


def test_rounded_of_a_double_rounding_trap_is_right() -> None:
    """1 + 2⁻⁸ + 2⁻³⁰ is above the middle of two bf16 numbers, but its fp32 neighbour is the middle."""
    trap = torch.tensor([1 + 2.0**-8 + 2.0**-30, 1 + 2.0**-8, 2.0**-135], dtype=torch.float64)
    assert rounded(trap, torch.bfloat16).tolist() == [1 + 2.0**-7, 1.0, 0.0]
    assert ulps(torch.tensor([-0.0, 1.0]), torch.tensor([0.0, 1 + 2.0**-23])).tolist() == [0, 1]
