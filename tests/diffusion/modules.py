"""Trained modules of each kind, and what updates make of a base in memory."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lora_export.adapters.diffusion.kinds import updates_of
from lora_export.adapters.kind import AdapterFile, float64
from lora_export.checkpoint.adapter_files import open_single_file
from lora_export.contracts import TargetUpdate
from lora_export.contracts.pipelines import Piece, TrainedModule

torch.set_num_threads(1)
Tensors = dict[str, torch.Tensor]
LAYER = "block.layer"


@dataclass
class Base:
    """adapters.kind.BaseModel over tensors in memory, in blocks of few rows."""

    tensors: Tensors

    def layers(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        return {}

    def has(self, weight: str) -> bool:
        return weight in self.tensors

    def blocks(self, weight: str) -> Iterator[torch.Tensor]:
        yield from self.tensors[weight].split(5)


@dataclass
class Case:
    """tensors: of one module by their parts; base: the component's tensors."""

    tensors: Tensors
    base: Tensors
    pieces: tuple[Piece, ...] = (Piece(LAYER),)
    weight: float = 1.0
    file: AdapterFile = field(init=False)

    def open(self, folder: Path) -> "Case":
        path = folder / "style.safetensors"
        save_file({f"lora_x.{part}": t.contiguous().clone() for part, t in self.tensors.items()}, path)
        source, _ = open_single_file(path)
        self.file = AdapterFile(source, {}, path, self.weight, base=Base(self.base))  # type: ignore[arg-type]
        return self

    @property
    def module(self) -> TrainedModule:
        alpha = self.tensors.get("alpha")
        keys = {part: f"lora_x.{part}" for part in self.tensors}
        return TrainedModule("lora_x", "unet", self.pieces, keys, None if alpha is None else float(alpha))

    def updates(self) -> list[TargetUpdate]:
        return updates_of(self.file, self.module, {n: tuple(t.shape) for n, t in self.base.items()})

    def merged(self, wide: bool = True) -> Tensors:
        """All weights of the base with the adapter, each update given the whole weight."""
        result = dict(self.base)
        for update in self.updates():
            weight = result[update.target]
            result[update.target] = applied(update, weight.double() if wide else weight, wide)
        return result


def applied(update: TargetUpdate, weight: torch.Tensor, wide: bool = True, step: int | None = None) -> torch.Tensor:
    """step: rows that are given at once."""
    if wide:
        with float64():
            loaded = update.load(tuple(weight.shape))
    else:
        loaded = update.load(tuple(weight.shape))
    step = step or len(weight)
    parts = []
    for start in range(0, len(weight), step):
        rows = weight[start : start + step].clone()
        parts.append(loaded.apply(rows, slice(start, start + len(rows))).reshape(rows.shape))
    return torch.cat(parts)


def normal(seed: int) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: 0.5 * torch.randn(*shape, generator=generator)


OUT, IN, KERNEL = 48, 20, (3, 3)


def made(kind: str, out: int = OUT, inputs: int = IN, kernel: tuple[int, ...] = ()) -> Tensors:
    """The tensors of a module of each kind; alpha ≠ r, and no factor is the identity."""
    r, n = 3, normal(len(kind))
    ones = (1,) * len(kernel)
    flat = inputs * (9 if kernel else 1)
    alpha = {"alpha": torch.tensor(2.0)}
    lora = {"lora_down": n(r, inputs, *kernel), "lora_up": n(out, r, *ones), **alpha}
    loha = {
        "hada_w1_a": n(out, r),
        "hada_w1_b": n(r, flat),
        "hada_w2_a": n(out, 5),
        "hada_w2_b": n(5, flat),
        **alpha,
    }
    lokr = {"lokr_w1": n(4, 4), "lokr_w2_a": n(out // 4, r), "lokr_w2_b": n(r, flat // 4), **alpha}
    over_out, over_in = (
        {"dora_scale": n(*shape, *ones).abs() + 1} for shape in ((out, 1), (1, inputs))
    )  # fmt: skip
    table: dict[str, Tensors] = {
        "lora": lora, "loha": loha, "lokr": lokr,
        "dora": lora | over_out, "dora_in": lora | over_in, "loha_dora_in": loha | over_in,
        "lokr_dora": lokr | over_out, "full_dora": {"diff": n(out, inputs, *kernel)} | over_out,
        "magnitude": lora | {"magnitude": n(out).abs() + 1},
        "lokr_whole": {"lokr_w1": n(4, 4), "lokr_w2": n(out // 4, inputs // 4, *kernel), **alpha},
        "lokr_both": {
            "lokr_w1_a": n(4, 2), "lokr_w1_b": n(2, 4), "lokr_w2": n(out // 4, inputs // 4, *kernel), **alpha,
        },
        "ia3": {"weight": n(1, out, *ones) if kernel else n(out), "on_input": torch.tensor(0)},
        "ia3_in": {"weight": n(1, inputs, *ones) if kernel else n(inputs), "on_input": torch.tensor(1)},
        "glora": {
            "a1": n(inputs, r, *ones), "a2": n(r, inputs, *ones), "b1": n(out, r, *ones),
            "b2": n(r, inputs, *kernel), **alpha,
        },
        "full": {"diff": n(out, inputs, *kernel), "diff_b": n(out)},
        "set": {"set_weight": n(out, inputs, *kernel)},
        "oft": {"oft_blocks": n(out // 8, 8, 8), "alpha": torch.tensor(0.05), "rescale": n(out, 1, *ones) + 1},
        "oft_wide": {"oft_blocks": n(3, out // 3, out // 3)},
        "boft": {"oft_blocks": n(4, out // 6, 6, 6), "alpha": torch.tensor(0.0)},
        "boft_small": {"oft_blocks": n(2, out // 4, 4, 4), "rescale": n(out, 1, *ones) + 1},
    }  # fmt: skip
    if kernel:
        core = {"lora_down": n(r, inputs, 1, 1), "lora_mid": n(r, r, *kernel), "lora_up": n(out, r, 1, 1), **alpha}
        cores = {"hada_t1": n(r, r, *kernel), "hada_t2": n(r, r, *kernel)}
        ab = {f"hada_w{i}_{s}": n(r, out if s == "a" else inputs) for i in "12" for s in "ab"}
        table |= {"lora_tucker": core, "loha_tucker": cores | ab | alpha, "lora_tucker_dora_in": core | over_in}
        table["lokr_tucker"] = {
            "lokr_w1": n(4, 4), "lokr_w2_a": n(r, out // 4), "lokr_w2_b": n(r, inputs // 4),
            "lokr_t2": n(r, r, *kernel), **alpha,
        }  # fmt: skip
    return table[kind]


LINEAR = (
    "lora", "loha", "lokr", "dora", "dora_in", "loha_dora_in", "lokr_dora", "full_dora", "magnitude", "lokr_whole",
    "lokr_both", "ia3", "ia3_in", "glora", "full", "set", "oft", "oft_wide", "boft", "boft_small",
)  # fmt: skip
CORES = ("lora_tucker", "loha_tucker", "lora_tucker_dora_in", "lokr_tucker")
ALL = [(kind, kernel) for kernel in ((), KERNEL) for kind in (*LINEAR, *(CORES if kernel else ()))]


def case(kind: str, kernel: tuple[int, ...], folder: Path, **changes: Any) -> Case:
    n = normal(99)
    base = {f"{LAYER}.weight": n(OUT, IN, *kernel), f"{LAYER}.bias": n(OUT)}
    return Case(**{"tensors": made(kind, kernel=kernel), "base": base, **changes}).open(folder)
