"""MiSS, Bone, HRA, FourierFT, VB-LoRA, RandLoRA, RoAd, SHiRA, C3A, WaveFT, DeLoRA, GraLoRA and LN tuning: their
papers' formulas in float64, in blocks of rows, where PEFT's own forward is fp32 or does not exist any more."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_export.adapter_tools import combine, truncate
from lora_export.adapter_tools.saving import Rank
from lora_export.adapter_tools.understand import understand
from lora_export.adapters import fourierft, hra, sparse
from lora_export.adapters.sparse import first_permuted
from lora_export.contracts import AdapterChoice, MergeOptions, TargetUpdate
from lora_export.errors import AdapterError, InputError
from lora_export.merging import merge, plan
from lora_export.merging.running.exact import ExactTensor
from tests.adapters.test_lora_family import close, in_blocks, random
from tests.builders import edit_tensors, tensors, updates_of
from tests.daily import daily
from tests.matrix.families import FAMILIES
from tests.matrix.rare import RARE
from tests.matrix.test_matrix import train


def read(folder: Path, values: dict[str, torch.Tensor], factor: float = 1.0, **config: Any) -> list[TargetUpdate]:
    return updates_of(folder, values, config, factor=factor)


# --- formulas -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peft_type", ["MISS", "BONE"])
def test_miss_block_repeats_along_inputs_and_is_cut(tmp_path: Path, peft_type: str) -> None:
    block, weight = random(4, 8), random(8, 11, seed=5)
    name = f"x.{peft_type.lower()}_block"
    (update,) = read(tmp_path, {name: block}, peft_type=peft_type, r=4, init_weights=True)
    delta = torch.stack([block.double()[i % 4] for i in range(11)], dim=1)
    close(in_blocks(update, weight), weight.double() + delta)
    assert update.fits((8, 11)) and not update.fits((8, 3)) and not update.fits((9, 11))


@pytest.mark.parametrize("peft_type", ["MISS", "BONE"])
def test_miss_bat_changes_each_block(tmp_path: Path, peft_type: str) -> None:
    blocks, weight = random(2, 4, 4), random(8, 12, seed=5)
    name = f"x.{peft_type.lower()}_block"
    (update,) = read(tmp_path, {name: blocks}, peft_type=peft_type, r=4, init_weights="bat")
    exact = weight.double().clone()
    for j in range(2):
        for i in range(3):
            part = exact[4 * j : 4 * j + 4, 4 * i : 4 * i + 4]
            part += part.clone() @ blocks[j].double() + blocks[j].double()
    close(in_blocks(update, weight), exact)
    assert not update.adds and not update.fits((8, 10)) and not update.fits((4, 12))


@pytest.mark.parametrize("orthogonal", [False, True])
def test_hra_applies_reflections_in_order(tmp_path: Path, orthogonal: bool) -> None:
    vectors, weight = random(12, 3), random(7, 12, seed=5)
    (update,) = read(tmp_path, {"x.hra_u": vectors}, peft_type="HRA", r=3, apply_GS=orthogonal)
    directions = torch.linalg.qr(vectors.double()).Q if orthogonal else vectors.double()
    exact = weight.double()
    for u in directions.T:
        exact = exact @ (torch.eye(12, dtype=torch.float64) - 2 * torch.outer(u, u) / (u @ u))
    close(in_blocks(update, weight), exact)
    left, right = hra.reflections(vectors.double())
    product = torch.eye(12, dtype=torch.float64) - left @ right
    torch.testing.assert_close(product @ product.T, torch.eye(12, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(6, 8), (7, 5), (8, 6)])
def test_fourierft_delta_is_sum_of_waves(tmp_path: Path, shape: tuple[int, int]) -> None:
    values, weight = random(9), random(*shape, seed=5)
    config = {"peft_type": "FOURIERFT", "scaling": 20.0, "random_loc_seed": 31}
    (update,) = read(tmp_path, {"x.fourierft_spectrum": values}, **config)
    height, width = shape
    row, column = (torch.arange(n, dtype=torch.float64) for n in shape)
    delta = torch.zeros(shape, dtype=torch.float64)
    places = torch.randperm(height * width, generator=torch.Generator().manual_seed(31))[:9]
    for value, place in zip(values.double(), places.tolist(), strict=True):
        angle = row[:, None] * (place // width) / height + column * (place % width) / width
        delta += value * torch.cos(2 * math.pi * angle) / (height * width)
    close(in_blocks(update, weight), weight.double() + 20 * delta)
    assert not update.fits((2, 4)) and update.copies == fourierft.COPIES


def test_c3a_blocks_are_circulant(tmp_path: Path) -> None:
    kernel, weight = random(2, 3, 4), random(8, 12, seed=5)
    (update,) = read(tmp_path, {"x.c3a_kernel": kernel}, peft_type="C3A")
    exact = weight.double().clone()
    for j in range(8):
        for i in range(12):
            exact[j, i] += kernel[j // 4, i // 4, (i % 4 - j % 4) % 4].double() / 12
    close(in_blocks(update, weight), exact)


@pytest.mark.parametrize("family", ["db1", "db2", "sym4"])
@pytest.mark.parametrize("shape", [(8, 6), (7, 9)])
def test_waveft_basis_is_outer_product_of_filters(tmp_path: Path, family: str, shape: tuple[int, int]) -> None:
    """The inverse transform as matrices: of the padded coefficients, L and H each for rows and columns."""
    from peft.tuners.waveft.wavelet import Wavelet

    values, weight = random(10), random(*shape, seed=5)
    config = {"peft_type": "WAVEFT", "scaling": 3.0, "random_loc_seed": 5, "use_idwt": True}
    (update,) = read(tmp_path, {"x.waveft_spectrum": values}, **config, wavelet_family=family)
    filters = [torch.tensor(f, dtype=torch.float64) for f in (Wavelet(family).rec_lo, Wavelet(family).rec_hi)]
    taps = len(filters[0])
    padded = [n + taps - 2 + (n + taps - 2) % 2 for n in shape]
    coefficients = torch.zeros(padded, dtype=torch.float64)
    places = torch.randperm(math.prod(shape), generator=torch.Generator().manual_seed(5))[:10]
    offsets = [(p - n) // 2 for p, n in zip(padded, shape, strict=True)]
    coefficients[places // shape[1] + offsets[0], places % shape[1] + offsets[1]] = values.double()
    synthesis = []
    for size in padded:
        matrices = [torch.zeros(size + taps - 2, size // 2, dtype=torch.float64) for _ in filters]
        for matrix, taken in zip(matrices, filters, strict=True):
            for k in range(size // 2):
                matrix[2 * k : 2 * k + taps, k] = taken
        synthesis.append([m[taps - 2 : len(m) - taps + 2] for m in matrices])
    (low, high), (across_low, across_high) = synthesis
    (a, b), (c, d) = (half.chunk(2, 1) for half in coefficients.chunk(2))
    delta = low @ a @ across_low.T + high @ b @ across_low.T + low @ c @ across_high.T + high @ d @ across_high.T
    cut = [(n - m) // 2 for n, m in zip(delta.shape, shape, strict=True)]
    delta = delta[cut[0] : cut[0] + shape[0], cut[1] : cut[1] + shape[1]]
    close(in_blocks(update, weight), weight.double() + 3 * delta)
    assert all(abs(float(f @ f) - 1) < 1e-9 for f in filters)


def test_waveft_many_coefficients_are_added_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values, weight = random(20), random(9, 8, seed=5)
    config = {"peft_type": "WAVEFT", "scaling": 3.0, "random_loc_seed": 5, "use_idwt": True}
    (update,) = read(tmp_path, {"x.waveft_spectrum": values}, **config, wavelet_family="db3")
    together = in_blocks(update, weight)
    monkeypatch.setattr(sparse, "_ENTRIES", 50)
    torch.testing.assert_close(in_blocks(update, weight), together)


@pytest.mark.parametrize(("seed", "total"), [(777, 12), (0, 5000), (2**40 + 3, 977), (-4, 300)])
def test_fourierft_positions_are_prefix_of_permutation(
    seed: int, total: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    for count in (1, 7, min(total, 250)):
        assert torch.equal(first_permuted(seed, total, count), whole[:count])
    assert torch.equal(first_permuted(seed, total, total), whole)
    monkeypatch.setattr(sparse, "_SHUFFLE_32", 10)  # what is larger is left to torch
    assert torch.equal(first_permuted(seed, total, 7), whole[:7])


def test_shira_duplicate_positions_add_up(tmp_path: Path) -> None:
    places = torch.tensor([[0, 4, 4], [6, 1, 1]], dtype=torch.int32)
    values = {"x.shira_weight": torch.tensor([1.0, 2.0, 4.0] + 9 * [0.0]), "x.shira_indices": places.repeat(1, 4)}
    (update,) = read(tmp_path, values, peft_type="SHIRA", r=1, factor=0.5)
    assert update.fits((5, 7)) and not update.fits((5, 8)) and not update.fits((12,))
    found = in_blocks(update, torch.zeros(5, 7))
    assert found.nonzero().tolist() == [[0, 6], [4, 1]] and found[0, 6] == 0.5 and found[4, 1] == 3


def test_ln_tuning_nested_layer_is_replaced(tmp_path: Path) -> None:
    values = {"x.norm.ln_tuning_layers.weight": random(6), "y.ln_tuning_layers.default.norm.bias": random(3)}
    found = read(tmp_path, values, peft_type="LN_TUNING")
    assert [(u.target, u.replaces, u.shapes) for u in found] == [
        ("x.norm.weight", True, ((6,),)),
        ("y.norm.bias", True, ((3,),)),
    ]
    assert torch.equal(in_blocks(found[0], torch.zeros(6)), values["x.norm.ln_tuning_layers.weight"])


# --- what all of them share ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["llama"].save(tmp_path_factory.mktemp("base") / "base")


ON_LLAMA = [k for k in RARE if RARE[k](FAMILIES["llama"]) is not None]
FACTORS = {"randlora", "shira", "gralora"}  # PEFT gives their deltas a factor


@pytest.mark.parametrize("kind", ON_LLAMA)
def test_keys_with_adapter_name_are_read(kind: str, llama: Path, tmp_path: Path) -> None:
    """As a state_dict has them that PEFT did not save."""
    from lora_export.adapters import AdapterFile, read_adapter
    from lora_export.checkpoint import open_adapter_files

    def targets() -> set[str]:
        config, found = open_adapter_files(tmp_path)
        return {
            u.target for u in read_adapter(AdapterFile(found, config, tmp_path / "c", base_shapes=shapes)).updates
        }

    shapes = {n: tuple(t.shape) for n, t in tensors(llama).items()}
    train(llama, FAMILIES["llama"], kind, tmp_path)
    before, changes = targets(), dict[str, torch.Tensor | None]()
    for key, value in tensors(tmp_path).items():
        module, _, leaf = key.rpartition(".")
        plain = leaf not in ("weight", "bias")
        changes |= {key: None, f"{key}.tuned" if plain else f"{module}.tuned.{leaf}": value}
    if "short" not in kind and kind not in ("vblora one", "miss bias"):
        edit_tensors(tmp_path / "adapter_model.safetensors", changes)
    assert targets() == before


@pytest.mark.parametrize("kind", daily(ON_LLAMA, [k for k in ON_LLAMA if " " not in k]))
def test_weight_scales_delta_or_is_refused(kind: str, llama: Path, tmp_path: Path) -> None:
    train(llama, FAMILIES["llama"], kind, tmp_path / "adapter")
    half = [AdapterChoice(tmp_path / "adapter", 0.5)]
    if kind.partition(" ")[0] not in FACTORS:
        with pytest.raises(AdapterError, match=r"and the weight is 0\.5"):
            merge(llama, half, tmp_path / "half")
        return
    merge(llama, half, tmp_path / "half")
    merge(llama, [AdapterChoice(tmp_path / "adapter")], tmp_path / "whole")
    before, some, all_ = (tensors(f) for f in (llama, tmp_path / "half", tmp_path / "whole"))
    for name, weight in before.items():
        torch.testing.assert_close(some[name], (weight + all_[name]) / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", daily(ON_LLAMA, ["waveft sym3", "hra", "road 4", "miss bat"]))
def test_update_terms_bound_its_result(kind: str, llama: Path, tmp_path: Path) -> None:
    """The certificate's bound rests on them."""
    train(llama, FAMILIES["llama"], kind, tmp_path)
    planned = plan(llama, [AdapterChoice(tmp_path)], MergeOptions())
    for tensor in planned.tensors.values():
        if tensor.updates:
            whole, exact = (0, tensor.shape[0]), ExactTensor(tensor, planned.base)
            assert bool((exact._terms(*whole) >= exact._exact(*whole).abs() * (1 - 1e-12)).all()), (
                tensor.output.name
            )


@pytest.mark.parametrize("kind", daily(ON_LLAMA, ["gralora wide", "fourierft"]))
def test_inspect_with_base_has_figures_for_every_matrix(kind: str, llama: Path, tmp_path: Path) -> None:
    """Ranks may be larger than the matrix, and its singular values fewer."""
    train(llama, FAMILIES["llama"], kind, tmp_path)
    if kind == "ln tuning":
        with pytest.raises(InputError, match="depends on the base"):
            understand(tmp_path, llama)
        return
    found = understand(tmp_path, llama)
    assert len(found.modules) == 14 and found.sentences and not found.skipped
    assert all(m.norm > 0 and m.relative for m in found.modules)


COMBINED = ["miss", "fourierft", "vblora", "randlora", "shira", "c3a", "waveft", "delora", "gralora"]


@pytest.mark.parametrize("kind", daily(COMBINED, ["waveft", "vblora"]))
def test_combine_rare_kinds_adds_deltas(kind: str, llama: Path, tmp_path: Path) -> None:
    """TIES with all of the deltas kept and one adapter is the adapter; a weighted sum is one of the deltas."""
    train(llama, FAMILIES["llama"], kind, tmp_path / "a")
    train(llama, FAMILIES["llama"], "lora", tmp_path / "b")
    choices = [AdapterChoice(tmp_path / "a", 0.5), AdapterChoice(tmp_path / "b", 2.0)]
    merge(llama, choices, tmp_path / "sum", MergeOptions(combine="linear"))
    for name in ("a", "b"):
        merge(llama, [AdapterChoice(tmp_path / name)], tmp_path / f"with {name}")
    before, first, second, both = (
        tensors(f) for f in (llama, *(tmp_path / n for n in ("with a", "with b", "sum")))
    )
    for name, weight in before.items():
        exact = weight + 0.5 * (first[name] - weight) + 2 * (second[name] - weight)
        torch.testing.assert_close(both[name], exact, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", ["vblora", "delora", "gralora hybrid"])
def test_combine_at_full_rank_equals_adapter(kind: str, llama: Path, tmp_path: Path) -> None:
    train(llama, FAMILIES["llama"], kind, tmp_path / "adapter")
    truncate(tmp_path / "adapter", tmp_path / "lora", Rank(rank=48))
    for name in ("adapter", "lora"):
        merge(llama, [AdapterChoice(tmp_path / name)], tmp_path / f"with {name}")
    first, second = tensors(tmp_path / "with adapter"), tensors(tmp_path / "with lora")
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["miss", "fourierft", "shira", "ln tuning"])
def test_combine_kinds_without_factors_is_refused(kind: str, llama: Path, tmp_path: Path) -> None:
    train(llama, FAMILIES["llama"], kind, tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"has no matrices A and B of one rank"):
        truncate(tmp_path / "adapter", tmp_path / "lora", Rank(rank=2))
    with pytest.raises(AdapterError, match=r"follows from the base|is not a delta"):
        combine([AdapterChoice(tmp_path / "adapter")], tmp_path / "lora", MergeOptions(combine="linear"))
