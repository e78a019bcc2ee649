"""The share of an adapter's effect, against the figures that its definition gives in float64 here."""

import math

import numpy as np
import pytest
import torch

from lora_export.validation.effect import effect

VOCABULARY = 11


def random(length: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(length, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * scale


def windows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCABULARY, (n,), generator=generator) for n in (4, 7, 5)]


def measured(low_base_of: object, low_of: object, adapter: float = 1.0) -> effect.Effect:
    """Three windows; low_base_of(base) and low_of(merged) make the logits in lower precision."""
    found = effect.Effect()
    for i, ids in enumerate(windows()):
        base = random(len(ids), i)
        merged = base + adapter * random(len(ids), 10 + i)
        found.add(ids, base, merged, low_base_of(base), low_of(merged))  # type: ignore[operator]
    return found


def log_softmax(logits: torch.Tensor) -> np.ndarray:
    x = logits.numpy().astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_effect_matches_definition() -> None:
    found = measured(lambda b: b + random(len(b), 20, 0.3), lambda m: m + random(len(m), 21, 0.3))
    whole = kept = kl_base = kl_lost = surprise = 0.0
    for i, ids in enumerate(windows()):
        base = random(len(ids), i)
        merged = base + random(len(ids), 10 + i)
        b, m = log_softmax(base), log_softmax(merged)
        bq = log_softmax(base + random(len(ids), 20, 0.3))
        q = log_softmax(merged + random(len(ids), 21, 0.3))
        whole += ((np.exp(m) - np.exp(b)) * (m - b)).sum()
        kept += ((np.exp(m) - np.exp(b)) * (q - bq)).sum()
        kl_base += (np.exp(b) * (b - m)).sum()
        kl_lost += (np.exp(m) * (m - q)).sum()
        surprise -= sum(q[t, ids[t + 1]] for t in range(len(ids) - 1))
    survival = found.survival("x")
    assert survival.share == pytest.approx(kept / whole, rel=1e-9)
    assert survival.kl_base == pytest.approx(kl_base / 16, rel=1e-9)
    assert survival.kl_lost == pytest.approx(kl_lost / 16, rel=1e-9)
    (perplexity,) = found.perplexities([("Q", "q")])
    assert perplexity.value == pytest.approx(math.exp(surprise / 13), rel=1e-9)
    assert perplexity.tokens == 13


def test_effect_fidelity_matches_definition() -> None:
    found = measured(lambda b: b + random(len(b), 20, 0.3), lambda m: m + random(len(m), 21, 0.3))
    lost, of_base, lengths = [], 0.0, []
    for i, ids in enumerate(windows()):
        base = random(len(ids), i)
        merged = base + random(len(ids), 10 + i)
        b, m = log_softmax(base), log_softmax(merged)
        q, bq = log_softmax(merged + random(len(ids), 21, 0.3)), log_softmax(base + random(len(ids), 20, 0.3))
        lost.append((np.exp(m) * (m - q)).sum())
        of_base += (np.exp(b) * (b - bq)).sum()
        lengths.append(len(ids))
    far, mean = found.fidelity, sum(lost) / sum(lengths)
    rest = sum((x - mean * n) ** 2 for x, n in zip(lost, lengths, strict=True))
    assert far.lost == pytest.approx(mean, rel=1e-9)
    assert far.error == pytest.approx(math.sqrt(rest * 3 / 2) / sum(lengths), rel=1e-9)
    assert far.of_base == pytest.approx(of_base / sum(lengths), rel=1e-9)
    assert far.effect == pytest.approx(sum(found.whole) / sum(lengths), rel=1e-9)
    survival = found.survival("x")
    assert (survival.share_error, survival.kl_lost_error) == (found.uncertainty, far.error)


def test_effect_of_one_text_has_no_error() -> None:
    found = effect.Effect()
    base = random(5, 0)
    found.add(windows()[2], base, base + random(5, 1), base, base)
    assert found.survival("x").share_error is None and found.survival("x").kl_lost_error is None


def test_effect_is_symmetric_divergence() -> None:
    found = measured(lambda b: b, lambda m: m)
    both = 0.0
    for i, ids in enumerate(windows()):
        b, m = log_softmax(random(len(ids), i)), log_softmax(random(len(ids), i) + random(len(ids), 10 + i))
        both += (np.exp(m) * (m - b)).sum() + (np.exp(b) * (b - m)).sum()
    assert sum(found.whole) == pytest.approx(both, rel=1e-9)
    assert found.share == pytest.approx(1, abs=1e-12)
    assert found.uncertainty == pytest.approx(0, abs=1e-12)


def test_effect_ignores_common_damage() -> None:
    def damage(x: torch.Tensor) -> torch.Tensor:
        return x + random(len(x), 30, 5.0)

    found = measured(damage, damage)
    assert found.share == pytest.approx(1, abs=1e-6)
    assert found.survival("x").kl_lost > 1


def test_effect_of_lost_adapter_is_zero() -> None:
    found = effect.Effect()
    for i, ids in enumerate(windows()):
        base = random(len(ids), i)
        found.add(ids, base, base + random(len(ids), 10 + i), base, base)
    assert found.share == pytest.approx(0, abs=1e-12)


def test_effect_of_half_adapter_is_half() -> None:
    found = effect.Effect()
    for i, ids in enumerate(windows()):
        base, update = random(len(ids), i), random(len(ids), 10 + i)
        found.add(ids, base, base + update, base, base + update / 2)
    assert found.share == pytest.approx(0.5, abs=1e-6)


def test_effect_without_adapter_is_none() -> None:
    found = measured(lambda b: b, lambda m: m + random(len(m), 5), adapter=0.0)
    assert found.share is None
    assert math.isnan(found.uncertainty)
    assert found.survival("x").kl_base == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_effect_of_nan_logits_is_finite(value: float) -> None:
    found = measured(lambda b: b, lambda m: torch.full_like(m, value))
    assert found.share is not None and math.isfinite(found.share) and found.share < 0.5
    assert math.isfinite(found.survival("x").kl_lost)


def test_perplexity_matches_cross_entropy() -> None:
    table = random(VOCABULARY, 40)
    found = effect.perplexity("m", lambda ids: table[ids], windows())
    losses = [
        torch.nn.functional.cross_entropy(table[ids[:-1]].double(), ids[1:], reduction="sum") for ids in windows()
    ]
    assert found.value == pytest.approx(math.exp(float(sum(losses)) / 13), rel=1e-9)
    assert (found.model, found.tokens) == ("m", 13)
