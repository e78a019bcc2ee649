"""VeRA (arXiv:2310.11454, eq. 2): W' = W + Λb·B·Λd·A, with one random pair A, B for all layers, sliced."""

import math
from dataclasses import dataclass

import torch

from lora_export.adapters.config import Positive
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.module import SAVE_AGAIN, AdaptedModule, Shapes, complete
from lora_export.adapters.updates import LowRankUpdate
from lora_export.contracts import TargetUpdate

NAME = "VeRA"
FORMULA = "W + diag(λb)·B[:out]·diag(λd)·A[:, :in], A and B shared by all layers"


@dataclass(frozen=True)
class Settings:
    """projection_prng_key: the seed of A and B, where they were not saved."""

    r: Positive
    save_projection: bool = True
    projection_prng_key: int | None = None


@dataclass(frozen=True)
class Names:
    """Of a kind that shares A and B as VeRA does. kind: what they begin with; halves: A and λd have so many times r
    rows."""

    kind: str = "vera"
    halves: int = 1

    @property
    def scales(self) -> tuple[str, str]:
        return f"{self.kind}_lambda_b", f"{self.kind}_lambda_d"

    @property
    def shared(self) -> tuple[str, str]:
        return f"{self.kind}_A", f"{self.kind}_B"

    @property
    def rows(self) -> str:
        """Of A, in words."""
        return "r" if self.halves == 1 else f"{self.halves}·r"

    @property
    def save_them(self) -> str:
        """What makes PEFT save the projections that it was told to leave out."""
        return (
            "in Python: m = PeftModel.from_pretrained(BASE_MODEL, ADAPTER); [p._non_persistent_buffers_set.clear() "
            f"for p in (m.base_model.{self.kind}_A, m.base_model.{self.kind}_B)]; "
            "m.peft_config['default'].save_projection = True; m.save_pretrained(DIR)"
        )


@dataclass(frozen=True)
class SlicedTarget(TargetUpdate):
    """A weight whose outputs are known, and which has at most `widest` inputs (None: any number)."""

    file: AdapterFile | None = None
    outputs: int = 0
    widest: int | None = None
    fan_in_fan_out: bool = False

    def is_transposed(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of this shape is stored (in, out): GPT-2's Conv1D."""
        return self.fan_in_fan_out and shape[1] == self.outputs

    def fits(self, shape: tuple[int, ...]) -> bool:
        """As for any update. AdapterError for a weight that only fits transposed, if nothing says it is."""
        if super().fits(shape):
            return self._reaches(shape[0 if self.is_transposed(shape) else 1])
        if len(shape) == 2 and shape[1] == self.outputs and self._reaches(shape[0]) and self.file is not None:
            raise self.file.refuse(
                f"a base weight of shape {list(shape)} would fit this layer if it was stored transposed (Conv1D), "
                "but fan_in_fan_out is false",
                tensor=self.target,
                expected=f"({self.outputs}, in); or fan_in_fan_out: true, which PEFT loses where a linear layer, "
                "such as the head, is adapted too",
                next_step="if the layer is a Conv1D, set fan_in_fan_out to true in adapter_config.json",
            )
        return False

    def _reaches(self, inputs: int) -> bool:
        return self.widest is None or inputs <= self.widest


def regenerate(
    seed: int, rank: int, widest: int, outputs: int, halves: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """A of shape (halves · rank, widest) and B of shape (outputs, rank), as PEFT draws them of a seed.

    One generator, first A, then B, each row by row, uniform with the bound √(6/fan-in). A therefore depends on
    `widest`, the largest input of all adapted layers; the first rows of B do not depend on how many follow.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    drawn = []
    for shape in ((halves * rank, widest), (outputs, rank)):
        # These three roundings in a row are PEFT's: the bound must be the same to the last bit.
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
        drawn.append(torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator))
    return drawn[0], drawn[1]


@dataclass(frozen=True)
class Projections:
    """The shared pair: its keys in the file, or none and the seed that it was drawn from."""

    file: AdapterFile
    rank: int
    keys: tuple[str, ...]
    seed: int = 0
    drawn_inputs: int | None = None
    names: Names = Names()

    @property
    def widest(self) -> int | None:
        """The inputs that A reaches; None where it is drawn for one layer, whatever its inputs are."""
        return self.file.tensors[self.keys[0]].shape[1] if self.keys else self.drawn_inputs

    def holds(self, outputs: int) -> bool:
        """Whether B has as many rows."""
        return not self.keys or outputs <= self.file.tensors[self.keys[1]].shape[0]

    def sliced(self, outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A of shape (r, in) and B of shape (out, r) for one layer, fp32."""
        if not self.keys:
            a, b = regenerate(self.seed, self.rank, self.drawn_inputs or inputs, outputs, self.names.halves)
        else:
            a, b = (self.file.read(k) for k in self.keys)
        return a[: self.rank, :inputs], b[:outputs]


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each layer; the first of them claims the shared projections, where they were saved."""
    return read_shared(file, Names())


def read_shared(file: AdapterFile, names: Names) -> list[TargetUpdate]:
    """The updates of a kind that shares A and B as VeRA does, under its own names."""
    adapted = complete(file, *names.scales)
    if not adapted:
        return []
    settings, held = file.settings(Settings), [n for n in names.shared if n in file.tensors]
    if settings.save_projection:
        shared = _saved(file, names, held, settings.r)
    else:
        shared = _drawn(file, names, held, settings, adapted)
    return [_update(module, shared, shared.keys if module is adapted[0] else ()) for module in adapted]


def _saved(file: AdapterFile, names: Names, held: list[str], rank: int) -> Projections:
    missing = [n for n in names.shared if n not in held]
    if missing:
        raise file.refuse(
            f"save_projection is set, but {' and '.join(missing)} cannot be found",
            tensor=f"base_model.{missing[0]}",
            expected="both projections in the file",
            next_step=SAVE_AGAIN,
        )
    a, b = (file.tensors[k].shape for k in names.shared)
    if not (len(a) == len(b) == 2 and a[0] == names.halves * rank and b[1] == rank):
        raise file.refuse(
            f"{names.shared[0]} has the shape {list(a)}, {names.shared[1]} {list(b)}, and r is {rank}",
            tensor=names.shared[0],
            expected=f"A of shape ({names.rows}, in) and B of shape (out, r), with the largest in and out",
        )
    return Projections(file, rank, names.shared, names=names)


def _drawn(
    file: AdapterFile, names: Names, held: list[str], settings: Settings, adapted: list[AdaptedModule]
) -> Projections:
    both = " and ".join(names.shared)
    if held:
        raise file.refuse(
            "save_projection is false, but the file holds a projection, which PEFT would not use",
            tensor=min(held),
            expected=f"save_projection: true, or a file without {both}",
        )
    if settings.projection_prng_key is None:
        raise file.refuse("projection_prng_key is None", expected=f"the seed of {both}")
    inputs = [_inputs(module, names.scales[0]) for module in adapted]
    unknown = [module.name for module, size in zip(adapted, inputs, strict=True) if size is None]
    if unknown and len(adapted) > 1:
        raise file.refuse(
            "the projections were not saved (save_projection is false), and drawing them again needs the largest "
            f"input of all {len(adapted)} layers, which the adapter does not record",
            tensor=unknown[0],
            expected=f"the base that it was trained on, or an adapter with {both}",
            next_step=names.save_them,
        )
    widest = None if unknown else max(n for n in inputs if n is not None)
    return Projections(file, settings.r, (), settings.projection_prng_key, widest, names)


def _inputs(module: AdaptedModule, scale: str) -> int | None:
    """How many inputs the layer has: the side of the base's weight that is not the outputs'."""
    shape = module.file.base_shape(module.weight)
    if shape is None or len(shape) != 2:
        return None
    return shape[1] if module.shape(scale) == shape[:1] else shape[0]


def _update(module: AdaptedModule, shared: Projections, claimed: tuple[str, ...]) -> TargetUpdate:
    file, names = module.file, shared.names
    b, d = (module.shape(p) for p in names.scales)
    if len(b) != 1 or d != (names.halves * shared.rank,) or not shared.holds(b[0]):
        raise module.disagree(
            f"shapes (out,) and ({names.rows},), with no more outputs than {names.shared[1]} has rows",
            also=f"r is {shared.rank}",
        )
    # The shape cannot tell Conv1D from a wrong base here, as the adapter does not hold the inputs' number.
    flips = module.is_conv1d
    shapes: Shapes = ((b[0], None), (None, b[0])) if flips else ((b[0], None),)

    def load(shape: tuple[int, ...]) -> LowRankUpdate:
        flip = target.is_transposed(shape)
        down, up = shared.sliced(b[0], shape[0] if flip else shape[1])
        outputs, ranks = (module.read(p) for p in names.scales)
        return LowRankUpdate.of(outputs[:, None] * up, ranks[: shared.rank, None] * down, file.weight, flip)

    target = SlicedTarget(
        module.weight, names.kind, (*module.used, *claimed), shapes, load, adds=True, low_rank=True,
        file=file, outputs=b[0], widest=shared.widest, fan_in_fan_out=flips,
    )  # fmt: skip
    return target
