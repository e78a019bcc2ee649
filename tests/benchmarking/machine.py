"""Simulated studies: arms whose latency is made of noise of known kinds, measured and judged as real ones are."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from lora_export.benchmarking.measure import check, measure
from lora_export.benchmarking.statistics import judge

MARGIN = 0.01
_MS = 20.0


@dataclass(frozen=True)
class Noise:
    """own: of each call, as a standard deviation of the logarithm; mood: of what neighbouring calls share, which
    is forgotten by `persistence` a call; drift: relative, a call; wave: amplitude of a swing over 500 calls;
    stolen: share of calls that take three times as long."""

    own: float = 0.02
    mood: float = 0.0
    persistence: float = 0.9
    drift: float = 0.0
    wave: float = 0.0
    stolen: float = 0.0


NOISES: Mapping[str, Noise] = {
    "independent": Noise(),
    "autocorrelated": Noise(mood=0.02, persistence=0.95),
    "drifting": Noise(drift=1e-4, wave=0.05),
    "disturbed": Noise(stolen=0.02),
    "all of these": Noise(mood=0.02, drift=1e-4, wave=0.03, stolen=0.01),
}


class Machine:
    """A clock, and arms that move it."""

    def __init__(self, rng: np.random.Generator, noise: Noise) -> None:
        self.rng, self.noise, self.now, self.mood, self.calls = rng, noise, 0.0, 0.0, 0

    def arm(self, ratio: float) -> Callable[[], float]:
        noise, normal = self.noise, self.rng.normal

        def call() -> float:
            self.calls += 1
            self.mood = noise.persistence * self.mood + (normal(0, noise.mood) if noise.mood else 0.0)
            slow = (1 + noise.drift * self.calls) * (1 + noise.wave * math.sin(self.calls * math.tau / 500))
            stolen = 3.0 if noise.stolen and self.rng.random() < noise.stolen else 1.0
            ms = _MS * ratio * slow * stolen * math.exp(self.mood + normal(0, noise.own))
            self.now += ms / 1e3
            return float(ms)

        return call


def verdict(ratio: float, noise: Noise, seed: int, seconds: float = 60) -> str:
    """Of one study whose merged arm really takes `ratio` times as long as the base."""
    rng = np.random.default_rng(seed)
    machine = Machine(rng, noise)
    arms = {"base": machine.arm(1), "again": machine.arm(1), "merged": machine.arm(ratio)}
    series = measure(
        arms,
        pairs=(("again", ("base",)), ("merged", ("base", "again"))),
        margin=MARGIN,
        seconds=seconds,
        rng=rng,
        clock=lambda: machine.now,
    )
    merged = series.against("merged", "base", "again", rng=rng)
    floor = series.against("again", "base", rng=rng)
    return judge(merged, floor, None, series.blocks, MARGIN)[0]


def suspected(ratio: float, noise: Noise, seed: int) -> bool:
    """Whether a check of identical graphs finds merged slower, so that it is measured again in other sessions."""
    rng = np.random.default_rng(seed)
    machine = Machine(rng, noise)
    arms = {"base": machine.arm(1), "again": machine.arm(1), "merged": machine.arm(ratio)}
    series = check(arms, arm="merged", references=("base", "again"), rng=rng, clock=lambda: machine.now)
    merged, floor = series.against("merged", "base", "again", rng=rng), series.against("again", "base", rng=rng)
    return judge(merged, floor, None, series.blocks, MARGIN)[0] == "slower"


def rates(ratio: float, noise: Noise, studies: int) -> dict[str, float]:
    found = Counter(verdict(ratio, noise, seed) for seed in range(studies))
    return {name: found[name] / studies for name in ("equivalent", "slower", "inconclusive")}
