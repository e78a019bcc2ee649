"""Honest exports: kinds of model and precisions in turn, adapters of many sizes, texts of many lengths."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_export.choices import Precision
from tests.validation.graphs.models import Tiny

TINY, LARGE = 1e-4, 2.0  # updates as shares of the norm of their weights
ORDINARY = (0.01, 0.03, 0.1, 0.3, 0.6)
TEXTS = ("decoder", "encoder", "encoder-decoder")


@dataclass(frozen=True)
class Case:
    """own_prompts: texts of random letters and lengths in place of the built-in ones."""

    tiny: Tiny
    precision: Precision
    seed: int
    ratio: float
    own_prompts: bool

    @property
    def words(self) -> str:
        texts = ", own prompts" if self.own_prompts else ""
        return f"{self.tiny.cls} {self.precision}, seed {self.seed}, update {self.ratio:g}{texts}"


def cases(
    groups: Sequence[Sequence[Tiny]], precisions: Sequence[Precision], count: int, seed: int
) -> Iterator[Case]:
    """A third of the updates are tiny or large."""
    rng = random.Random(seed)
    extreme = [(TINY, LARGE)[i % 2] for i in range(count // 3)]
    ratios = extreme + [rng.choice(ORDINARY) for _ in range(count - len(extreme))]
    rng.shuffle(ratios)
    for number, ratio in enumerate(ratios):
        group, turn = groups[number % len(groups)], number // len(groups)
        tiny = group[turn // len(precisions) % len(group)]
        own = tiny.kind in TEXTS and rng.random() < 0.5
        yield Case(tiny, precisions[turn % len(precisions)], 100 * seed + number, ratio, own)


def prompts(case: Case, work: Path) -> Path | None:
    if not case.own_prompts:
        return None
    rng = random.Random(case.seed)
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOP0123456789,;:-+"
    lines = ["".join(rng.choices(letters, k=rng.randrange(2, 100))) for _ in range(5)]
    path = work / "prompts.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
