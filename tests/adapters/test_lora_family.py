"""DoRA, AdaLoRA, convolutions, trained tokens and recomputed initialisations, against float64 by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_export.contracts import TargetUpdate
from lora_export.errors import AdapterError
from tests.builders import updates_of

R, S = 4, 2.5  # rank, and scaling with alpha 10


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def updates(folder: Path, values: dict[str, torch.Tensor], **config: Any) -> list[TargetUpdate]:
    return updates_of(folder, values, {"peft_type": "LORA", "r": R, "lora_alpha": 10} | config)


def in_blocks(update: TargetUpdate, weight: torch.Tensor, size: int = 3) -> torch.Tensor:
    """The updated weight, block by block where the update allows it."""
    loaded = update.load(tuple(weight.shape))
    step = size if update.row_wise(tuple(weight.shape)) else len(weight)
    return torch.cat(
        [
            loaded.apply(weight[i : i + step].clone(), slice(i, min(i + step, len(weight))))
            for i in range(0, len(weight), step)
        ]
    )


def close(found: torch.Tensor, exact: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kernel", [(3,), (3, 5), (2, 3, 1), (1, 1)])
def test_lora_on_convolution_equals_formula(tmp_path: Path, kernel: tuple[int, ...]) -> None:
    a, b = random(R, 6, *kernel), random(8, R, *(1 for _ in kernel))
    (update,) = updates(tmp_path, {"c.lora_A.weight": a, "c.lora_B.weight": b})
    weight = random(8, 6, *kernel, seed=5)
    # The forward: a convolution with A into r channels, then a mix of those with B.
    delta = torch.einsum("or,ri...->oi...", b.double().flatten(1), a.double())
    close(in_blocks(update, weight), weight.double() + S * delta)


def test_dora_normalizes_each_output(tmp_path: Path) -> None:
    a, b, m = random(R, 7), random(9, R), random(9).abs() + 0.5
    values = {"x.lora_A.weight": a, "x.lora_B.weight": b, "x.lora_magnitude_vector": m}
    (update,) = updates(tmp_path, values, use_dora=True)
    weight = random(9, 7, seed=5)
    v = weight.double() + S * (b.double() @ a.double())
    exact = m.double()[:, None] * v / v.norm(dim=1, keepdim=True)
    close(in_blocks(update, weight), exact)
    close(in_blocks(update, weight.T.contiguous()), exact.T)  # Conv1D: outputs are columns


def test_dora_on_convolution_and_embedding_equals_formula(tmp_path: Path) -> None:
    a, b, m = random(R, 6, 3), random(8, R, 1), random(1, 8, 1).abs() + 0.5
    values = {"c.lora_A.weight": a, "c.lora_B.weight": b, "c.lora_magnitude_vector": m}
    (update,) = updates(tmp_path / "c", values, use_dora=True)
    weight = random(8, 6, 3, seed=5)
    v = weight.double() + S * torch.einsum("or,rik->oik", b.double()[:, :, 0], a.double())
    close(in_blocks(update, weight), m.double().reshape(8, 1, 1) * v / v.flatten(1).norm(dim=1).reshape(8, 1, 1))

    a, b, m = random(R, 11), random(5, R), random(5).abs() + 0.5
    values = {"e.lora_embedding_A": a, "e.lora_embedding_B": b, "e.lora_magnitude_vector": m}
    (update,) = updates(tmp_path / "e", values, use_dora=True)
    weight = random(11, 5, seed=5)
    v = weight.double() + S * (b.double() @ a.double()).T
    close(in_blocks(update, weight), m.double() * v / v.norm(dim=0))


@pytest.mark.parametrize("rank", [3, 0])
def test_adalora_divides_by_initial_rank(tmp_path: Path, rank: int) -> None:
    a, b, e = random(rank, 7), random(9, rank), random(rank, 1)
    values = {"x.lora_A": a, "x.lora_B": b, "x.lora_E": e}
    mask = [True] * rank + [False] * (6 - rank)
    config = {"peft_type": "ADALORA", "init_r": 6, "r": 99, "rank_pattern": {"x.lora_E": mask}}
    (update,) = updates(tmp_path, values, **config)
    weight = random(9, 7, seed=5)
    delta = b.double() @ (a.double() * e.double()) * 10 / (6 + 1e-5)
    close(in_blocks(update, weight), weight.double() + delta)
    with pytest.raises(AdapterError, match="configured rank is 6"):
        updates(tmp_path, values, **config | {"rank_pattern": None})
    with pytest.raises(AdapterError, match="a list of true and false"):
        updates(tmp_path, values, **config | {"rank_pattern": {"x.lora_E": 3}})
    with pytest.raises(AdapterError, match="lora_E of this module is missing"):
        updates(tmp_path, {k: v for k, v in values.items() if "E" not in k}, **config)


def test_trained_tokens_replace_only_their_rows(tmp_path: Path) -> None:
    rows = random(3, 5)
    values = {
        "e.token_adapter.trainable_tokens_delta": rows,
        "x.lora_A.weight": random(R, 7),
        "x.lora_B.weight": random(9, R),
    }
    found = updates(tmp_path, values, trainable_token_indices={"e": [8, 0, 5]})
    (update,) = [u for u in found if u.kind == "trainable_tokens"]
    weight = random(11, 5, seed=5)
    exact = weight.clone()
    exact[[8, 0, 5]] = rows
    assert torch.equal(in_blocks(update, weight), exact)
    assert update.tied and not update.replaces
    with pytest.raises(AdapterError, match="repeated or negative"):
        updates(tmp_path, values, trainable_token_indices=[1, 1, 2])
    with pytest.raises(AdapterError, match="does not say which tokens"):
        updates(tmp_path, values, trainable_token_indices={"other": [1, 2, 3]})


@pytest.mark.parametrize("shape", [(9, 7), (7, 9)])
def test_lora_residual_initialization_is_subtracted_from_base(tmp_path: Path, shape: tuple[int, int]) -> None:
    out, width = shape
    values = {"x.lora_A.weight": random(R, width), "x.lora_B.weight": random(out, R)}
    weight = random(out, width, seed=5)
    delta = S * (values["x.lora_B.weight"].double() @ values["x.lora_A.weight"].double())
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    (pissa,) = updates(tmp_path, values, init_lora_weights="pissa")
    close(in_blocks(pissa, weight), u[:, R:] @ torch.diag(s[R:]) @ v[R:] + delta)
    q, r = torch.linalg.qr(weight.double())
    (olora,) = updates(tmp_path, values, init_lora_weights="OLoRA")
    close(in_blocks(olora, weight), weight.double() - S * q[:, :R] @ r[:R] + delta)
    with pytest.raises(AdapterError, match="Conv1D"):
        olora.load((width, out))


@pytest.mark.parametrize("init", ["pissa_niter_16", "corda", "lora_ga", "loftq"])
def test_lora_initialization_not_recomputable_is_refused_with_conversion(tmp_path: Path, init: str) -> None:
    values = {"x.lora_A.weight": random(R, 7), "x.lora_B.weight": random(9, R)}
    with pytest.raises(AdapterError, match="path_initial_model_for_weight_conversion"):
        updates(tmp_path, values, init_lora_weights=init)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_lora_other_initializations_are_plain_lora(tmp_path: Path, init: str | bool) -> None:
    values = {"x.lora_A.weight": random(R, 7), "x.lora_B.weight": random(9, R)}
    (update,) = updates(tmp_path, values, init_lora_weights=init)
    assert update.row_wise((9, 7))
