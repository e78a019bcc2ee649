"""What a certificate says of the arithmetic, against formulas written down here in float64."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file

from lora_export.adapters.updates import rebuilt
from lora_export.contracts import AdapterChoice, MergeOptions, Update
from lora_export.errors import CheckpointError
from lora_export.merging import CERTIFICATE, merge
from lora_export.merging.planning.plan import PlannedTensor
from lora_export.merging.running import tensor as work
from tests.builders import edit_tensors, handmade_adapter, handmade_base, lora, save_adapter, save_base, tensors
from tests.matrix.families import FAMILIES
from tests.matrix.test_matrix import train

DTYPES = {"float32": (24, -126), "float16": (11, -14), "bfloat16": (8, -126)}  # digits, least exponent
Exact = Callable[[str, torch.Tensor], tuple[torch.Tensor, torch.Tensor] | None]


def ulp(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """The distance of two neighbours of a type at these values, by Python's own frexp."""
    digits, least = DTYPES[dtype]
    flat = [2.0 ** (max(math.frexp(v)[1] - 1, least) - digits + 1) for v in values.reshape(-1).tolist()]
    return torch.tensor(flat, dtype=torch.float64).reshape(values.shape)


def records_of(folder: Path) -> dict[str, Any]:
    return {r["name"]: r for r in json.loads((folder / CERTIFICATE).read_text())["records"]}


def leaves_hash(value: torch.Tensor) -> str:
    data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    leaves = [blake3(data[i : i + 2**18]).digest() for i in range(0, len(data), 2**18)]
    return blake3(b"".join(leaves)).hexdigest()


def handmade(folder: Path, dtype: torch.dtype, height: int = 301, width: int = 300) -> tuple[Path, Path]:
    base = handmade_base(folder / "base", {"m.proj.weight": (height, width), "m.other.weight": (7, 5)}, dtype)
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(s, generator=generator) * 0.05 for s in ((6, width), (height, 6)))
    return base, handmade_adapter(folder / "adapter", {"m.proj": (a, b)})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("certify", ["sampled", "full"])
def test_ulps_match_formula(tmp_path: Path, dtype: str, certify: Any) -> None:
    """W + 2.5·B·A in float64, and the written numbers beside it; some of the rows are those that docs promise."""
    base, adapter = handmade(tmp_path, getattr(torch, dtype))
    merge(base, [AdapterChoice(adapter)], tmp_path / "out", MergeOptions(certify=certify))
    found, matrices = (
        tensors(tmp_path / "out")["m.proj.weight"].double(),
        load_file(adapter / "adapter_model.safetensors"),
    )
    a, b = (matrices[f"base_model.model.m.proj.lora_{x}.weight"].double() for x in "AB")
    exact = tensors(base)["m.proj.weight"].double() + 2.5 * (b @ a)
    rows = list(range(301))
    if certify == "sampled":  # four places of 2¹² elements: 13 rows of 300, the last one at the end
        rows = [start + i for k in range(4) for start in [k * (301 - 13) // 3] for i in range(13)]
    ulps = ((found - exact).abs() / ulp(exact, dtype))[rows]
    record = records_of(tmp_path / "out")["m.proj.weight"]
    assert record["checked"] == ulps.numel()
    assert record["max_ulps"] == pytest.approx(float(ulps.max()), rel=1e-6)
    assert record["mean_ulps"] == pytest.approx(float(ulps.mean()), rel=1e-6)
    assert 0.2 < record["mean_ulps"] < 0.3  # of numbers that are rounded to the nearest it is a quarter
    other = records_of(tmp_path / "out")["m.other.weight"]
    assert (other["checked"], other["max_ulps"], other["operation"]) == (0, None, "copied")


@pytest.mark.parametrize("memory", [2**31, 2**16, 3 * 2**20, 2**23])
def test_hash_does_not_depend_on_pieces(tmp_path: Path, memory: int) -> None:
    base, adapter = handmade(tmp_path, torch.bfloat16, 1301, 703)
    edit_tensors(base / "model.safetensors", {"m.big": torch.arange(300_001), "m.empty": torch.zeros(0, 3)})
    merge(base, [AdapterChoice(adapter)], tmp_path / "out", MergeOptions(max_memory=memory))
    before, after, records = tensors(base), tensors(tmp_path / "out"), records_of(tmp_path / "out")
    assert records["m.proj.weight"]["hash_in"] != records["m.proj.weight"]["hash_out"]
    for name, record in records.items():
        assert record["hash_in"] == leaves_hash(before[name]), name
        assert record["hash_out"] == leaves_hash(after[name]), name


@pytest.mark.parametrize(("values", "count"), [((65502.0, -1e6, 65400.0), 2), ((65502.0,), 1), ((65400.0,), 0)])
def test_certificate_counts_saturated_elements(tmp_path: Path, values: tuple[float, ...], count: int) -> None:
    """Rounded up to the largest number, infinite, below."""
    base, adapter = handmade(tmp_path, torch.float32)
    weight = tensors(base)["m.proj.weight"]
    for row, value in enumerate(values):
        weight[row, 4] = value
    edit_tensors(base / "model.safetensors", {"m.proj.weight": weight})
    options = MergeOptions(dtype="float16", allow_nonfinite=True)
    merge(base, [AdapterChoice(adapter)], tmp_path / "out", options)
    record = records_of(tmp_path / "out")["m.proj.weight"]
    assert record["saturated"] == int((tensors(tmp_path / "out")["m.proj.weight"].abs() >= 65504).sum()) == count


# --- every kind --------------------------------------------------------------------------------------------


def parts(adapter: Path, name: str) -> dict[str, torch.Tensor]:
    """An adapter's tensors for a weight, by what follows the module's name, float64."""
    prefix = f"base_model.model.{name.rpartition('.')[0]}."
    found = load_file(adapter / "adapter_model.safetensors")
    return {
        k.removeprefix(prefix).removesuffix(".weight"): v.double() for k, v in found.items() if k.startswith(prefix)
    }


def of_lora(p: dict[str, torch.Tensor], w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = p["lora_A"], p["lora_B"]
    return w + 2.5 * (b @ a), w.abs() + 2.5 * (b.abs() @ a.abs())


def of_dora(p: dict[str, torch.Tensor], w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    changed, terms = of_lora(p, w)
    factor = p["lora_magnitude_vector"].reshape(-1, 1) / changed.norm(dim=1, keepdim=True)
    return factor * changed, factor * terms


def of_embedding(p: dict[str, torch.Tensor], w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = p["lora_embedding_A"], p["lora_embedding_B"]
    return w + 2.5 * (b @ a).T, w.abs() + 2.5 * (b.abs() @ a.abs()).T


def of_adalora(p: dict[str, torch.Tensor], w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a, b, s = p["lora_A"] * p["lora_E"], p["lora_B"], 10 / (6 + 1e-5)
    return w + s * (b @ a), w.abs() + s * (b.abs() @ a.abs())


def of_ia3(p: dict[str, torch.Tensor], w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    factors = p["ia3_l"].reshape(-1) if w.dim() == 1 else p["ia3_l"]  # (out, 1) or (1, in)
    return w * factors, (w * factors).abs()


def of_loha(p: dict[str, torch.Tensor], w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    names = [f"hada_w{n}_{x}" for n in "12" for x in "ab"]
    (a, b, c, d), positive = (p[n] for n in names), [p[n].abs() for n in names]
    terms = (positive[0] @ positive[1]) * (positive[2] @ positive[3])
    return w + 2.5 * (a @ b) * (c @ d), w.abs() + 2.5 * terms


def of_lokr(p: dict[str, torch.Tensor], w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = (p.get(f"lokr_w{n}") for n in "12")
    terms1, terms2 = (None if m is None else m.abs() for m in (first, second))
    if first is None:
        first, terms1 = p["lokr_w1_a"] @ p["lokr_w1_b"], p["lokr_w1_a"].abs() @ p["lokr_w1_b"].abs()
    if second is None:
        second, terms2 = p["lokr_w2_a"] @ p["lokr_w2_b"], p["lokr_w2_a"].abs() @ p["lokr_w2_b"].abs()
    assert terms1 is not None and terms2 is not None
    return w + 2.5 * torch.kron(first, second), w.abs() + 2.5 * torch.kron(terms1, terms2)


def of_vera(p: dict[str, torch.Tensor], w: torch.Tensor, shared: dict[str, torch.Tensor]) -> Any:
    b = p["vera_lambda_b"][:, None] * shared["vera_B"][: w.shape[0]].double()
    a = p["vera_lambda_d"][:, None] * shared["vera_A"][:, : w.shape[1]].double()
    return w + b @ a, w.abs() + b.abs() @ a.abs()


FORMULAS = {
    "lora": of_lora, "dora": of_dora, "lora embedding": of_embedding, "adalora": of_adalora, "ia3": of_ia3,
    "loha": of_loha, "lokr": of_lokr, "vera": of_vera,
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", FORMULAS)
def test_merge_rounding_is_within_bound(tmp_path: Path, kind: str, dtype: Any) -> None:
    """|out − exact| ≤ ½ ulp + 2⁻²²·(|W| + s·|B|·|A|), and 999 of 1000 numbers are rounded correctly."""
    family = FAMILIES["llama"]
    base = family.save(tmp_path / "base")
    train(base, family, kind, tmp_path / "adapter")
    options = MergeOptions(dtype=dtype, certify="full")
    merge(base, [AdapterChoice(tmp_path / "adapter")], tmp_path / "out", options)
    before, after, records = tensors(base), tensors(tmp_path / "out"), records_of(tmp_path / "out")
    shared = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    shared = {k.removeprefix("base_model."): v for k, v in shared.items() if "vera_" in k}
    count = right = 0
    for name in (n for n, r in records.items() if r["operation"] == "updated"):
        more = (shared,) if kind == "vera" else ()
        exact, terms = FORMULAS[kind](parts(tmp_path / "adapter", name), before[name].double(), *more)
        off, unit = (after[name].double() - exact).abs(), ulp(exact, dtype)
        assert bool((off <= unit / 2 + 2.0**-22 * terms).all()), name
        count, right = count + off.numel(), right + int((off <= unit / 2).sum())
        assert records[name]["checked"] == off.numel()
        assert records[name]["max_ulps"] == pytest.approx(float((off / unit).max()), rel=1e-6)
    assert count > 0 and right / count >= 0.999, right / count


# --- refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_beyond_bound_is_refused(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter that is applied with a factor that is off by a percent."""
    base, adapter = handmade(tmp_path, getattr(torch, dtype))
    real = work.load_updates

    def load_updates(tensor: PlannedTensor, wide: bool) -> list[Update]:
        return [
            rebuilt(u, lambda part: part * 1.01 if isinstance(part, float) else part) for u in real(tensor, wide)
        ]

    monkeypatch.setattr(work, "load_updates", load_updates)
    with pytest.raises(CheckpointError, match="beyond the bound") as caught:
        merge(base, [AdapterChoice(adapter)], tmp_path / "out")
    assert caught.value.tensor is not None and caught.value.tensor.startswith("m.proj.weight, row 0")
    assert {p.name for p in tmp_path.iterdir()} == {"base", "adapter"}


def test_certify_full_finds_one_wrong_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_export.merging.running.tensor import TensorWork

    base, adapter = handmade(tmp_path, torch.bfloat16)
    real = TensorWork.compute

    def compute(self: TensorWork, start: int, stop: int) -> torch.Tensor:
        rows = real(self, start, stop)
        rows[17, 5] += 0.25
        return rows

    monkeypatch.setattr(TensorWork, "compute", compute)
    with pytest.raises(CheckpointError, match="1 of 90300 numbers") as caught:
        merge(base, [AdapterChoice(adapter)], tmp_path / "out", MergeOptions(certify="full"))
    assert caught.value.tensor == "m.proj.weight, row 17"


def test_certify_beyond_memory_is_reported(tmp_path: Path) -> None:
    """PiSSA needs the whole weight, and in float64 twice the room."""
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    save_adapter(tmp_path / "adapter", base, lora(init_lora_weights="olora", target_modules=["down_proj"]))
    choices = [AdapterChoice(tmp_path / "adapter")]
    merge(base, choices, tmp_path / "out")
    name = "model.layers.0.mlp.down_proj.weight"
    assert records_of(tmp_path / "out")[name]["checked"] == 48 * 80
    merge(base, choices, tmp_path / "tight", MergeOptions(max_memory=48 * 80 * 4 * 20))
    document = json.loads((tmp_path / "tight" / CERTIFICATE).read_text())
    assert "float64 takes 0.6 MiB" in document["unchecked"][name]
    record = records_of(tmp_path / "tight")[name]
    assert (record["checked"], record["max_ulps"]) == (0, None) and record["hash_out"]


def test_merge_uncertified_writes_no_certificate(tmp_path: Path) -> None:
    base, adapter = handmade(tmp_path, torch.bfloat16)
    merge(base, [AdapterChoice(adapter)], tmp_path / "one")
    merge(base, [AdapterChoice(adapter)], tmp_path / "two", certified=False)
    assert records_of(tmp_path / "two")["m.proj.weight"]["hash_out"] is None
    one, two = (tensors(tmp_path / n)["m.proj.weight"] for n in ("one", "two"))
    assert torch.equal(one, two)


def test_certificate_is_reproducible(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    save_adapter(tmp_path / "adapter", base, peft.LoraConfig(r=6, lora_alpha=15, target_modules="all-linear"))
    for name in "abcd":
        merge(base, [AdapterChoice(tmp_path / "adapter")], tmp_path / name)
    assert len({(tmp_path / n / CERTIFICATE).read_bytes() for n in "abcd"}) == 1
