"""Products that are added to the weight: LoRA (LoCon, with a core), LoHa and LoKr, as LyCORIS and sd-scripts save.

The scale is alpha/r, and what r is, is each kind's own: arXiv:2309.14859, section 3, and LyCORIS' modules.
"""

from typing import TYPE_CHECKING

from lora_export.adapters.diffusion.kinds.direct import beside
from lora_export.adapters.diffusion.kinds.module import Trained, Whole
from lora_export.adapters.diffusion.pieces import Shape
from lora_export.adapters.loha import HadamardUpdate
from lora_export.adapters.lokr import KroneckerUpdate
from lora_export.adapters.lycoris import product
from lora_export.adapters.updates import BiasUpdate, LowRankUpdate

if TYPE_CHECKING:
    import torch

_PAIR = ("lora_down", "lora_up")
_CORE = "lora_mid"


def lora(trained: Trained) -> Whole:
    """W + s·up·down; down (r, in, kernel…), up (out, r, 1…).

    With a core mid (r, r, kernel…), down is (r, in, 1…): W + s·Σ up[o, a]·mid[a, b, …]·down[b, i], which is the
    product of up with all the rest.
    """
    down, up = (trained.shape(part) for part in _PAIR)
    rank = down[0] if down else 0
    if len(down) < 2 or len(up) < 2 or rank == 0 or up[1] != rank or any(n != 1 for n in up[2:]):
        raise trained.disagree("down of shape (r, in, kernel…) and up of shape (out, r, 1…)", *_PAIR)
    rest = down[1:]
    if trained.has(_CORE):
        core = trained.shape(_CORE)
        if len(core) < 3 or core[:2] != (rank, rank) or any(n != 1 for n in down[2:]):
            raise trained.disagree("a core (r, r, kernel…), down (r, in, 1…) and up (out, r, 1…)", *_PAIR, _CORE)
        rest = (down[1], *core[2:])
    _check_growth(trained, (up[0], *rest))
    scaling = trained.scaling(rank)

    def load(_: Shape) -> LowRankUpdate:
        right = trained.matrix("lora_down")
        if trained.has(_CORE):
            right = product("ab...,bi->ai...", trained.read(_CORE), right).flatten(1)
        return LowRankUpdate.of(trained.matrix("lora_up"), right, trained.factor(scaling))

    parts = (*_PAIR, _CORE, "alpha", "scalar", "reshape_weight")
    kind = "lora_tucker" if trained.has(_CORE) else "lora"
    return Whole(kind, parts, up[0], rest, load, adds=True, low_rank=True)


def _check_growth(trained: Trained, shape: Shape) -> None:
    """A control adapter says with `reshape_weight` how large the weight was when it was trained."""
    if not trained.has("reshape_weight"):
        return
    wanted = tuple(int(n) for n in trained.read("reshape_weight").reshape(-1))
    stored = trained.stored("weight")
    if wanted != stored or shape[:2] != stored[:2]:
        raise trained.file.refuse(
            f"it was trained on a weight of shape {list(wanted)}, with columns that the base's, "
            f"{list(stored)}, does not have: the merged model would take other inputs than its class does",
            tensor=trained.module.keys["reshape_weight"],
            expected="a base whose weight has this shape",
            next_step="serve this adapter unmerged, in diffusers' control pipeline",
        )


def lora_bias(trained: Trained) -> Whole:
    """bias + s·value, with the scale of the product beside it (PEFT's lora_bias; without an alpha it is 1)."""
    part = "lora_up_bias"
    shape, scaling = trained.shape(part), trained.scaling(trained.shape("lora_down")[0])
    if shape != trained.shape("lora_up")[:1]:
        raise trained.disagree("one value for each row of up", part, "lora_up")

    def load(_: Shape) -> BiasUpdate:
        return BiasUpdate(trained.read(part), scaling)

    return Whole("lora_bias", (part,), shape[0], (), load, leaf="bias", adds=True)


def loha(trained: Trained) -> Whole:
    """W + s·(w1_a·w1_b) ⊙ (w2_a·w2_b). With cores t1, t2 each product is Σ w_a[a, o]·t[a, b, …]·w_b[b, i]."""
    parts = ("hada_w1_b", "hada_w1_a", "hada_w2_a", "hada_w2_b")
    cores = ("hada_t1", "hada_t2") if trained.has("hada_t1") else ()
    right = trained.shape("hada_w1_b")
    left_rank = 0 if cores else 1
    for number in "12":
        a, b = trained.shape(f"hada_w{number}_a"), trained.shape(f"hada_w{number}_b")
        if len(a) != 2 or len(b) != 2 or b[0] == 0 or a[left_rank] != b[0]:
            expected = "w_a (r, out) and w_b (r, in)" if cores else "w_a (out, r) and w_b (r, inputs)"
            raise trained.disagree(expected, f"hada_w{number}_a", f"hada_w{number}_b")
        core = trained.shape(f"hada_t{number}") if cores else (b[0], b[0], 1)
        if len(core) < 3 or core[:2] != (b[0], b[0]):
            raise trained.disagree("a core (r, r, kernel…)", f"hada_t{number}", f"hada_w{number}_b")
    for first, second in (("hada_w1_a", "hada_w2_a"), ("hada_w1_b", "hada_w2_b"), cores or ("alpha", "alpha")):
        outer = 1 - left_rank if first.endswith("_a") else 1
        if first != "alpha" and _size(trained, first, outer) != _size(trained, second, outer):
            raise trained.disagree("two products of the same shape", first, second)
    rank, outputs = right[0], trained.shape("hada_w1_a")[1 - left_rank]
    scaling = trained.scaling(rank)

    def load(_: Shape) -> HadamardUpdate:
        return HadamardUpdate(_hadamard(trained, "1"), _hadamard(trained, "2"), trained.factor(scaling))

    rest: Shape | int = (right[1], *trained.shape("hada_t1")[2:]) if cores else right[1]
    return Whole("loha", (*parts, *cores, "alpha", "scalar"), outputs, rest, load, adds=True)


def _size(trained: Trained, part: str, outer: int) -> Shape:
    """What both products must have in common; their ranks may differ."""
    shape = trained.shape(part)
    return shape[2:] if part.startswith("hada_t") else shape[outer : outer + 1]


def _hadamard(trained: Trained, number: str) -> "tuple[torch.Tensor, torch.Tensor]":
    """(outputs, r) and (r, rest)."""
    a, b = (trained.read(f"hada_w{number}_{side}") for side in "ab")
    core = f"hada_t{number}"
    if not trained.has(core):
        return a, b
    return a.T.contiguous(), product("ab...,bi->ai...", trained.read(core), b).flatten(1)


def lokr(trained: Trained) -> Whole:
    """W + s·w1 ⊗ w2, flat. Each factor is whole or a·b; w2 may have a core t2: Σ w2_a[a, o]·t2[a, b, …]·w2_b[b, i].

    r is the rank of w2, else of w1. Where both are whole there is none, and whatever alpha says the scale is 1.
    """
    first, _ = _factor_shape(trained, "1")
    second, rank = _factor_shape(trained, "2")
    if len(first) != 2:
        raise trained.disagree("a matrix", "lokr_w1")
    if rank is None and trained.has("lokr_w1_b"):
        rank = trained.shape("lokr_w1_b")[0]
    scaling = trained.file.weight if rank is None else trained.scaling(rank)

    def load(_: Shape) -> KroneckerUpdate:
        left, right = _factor(trained, "1"), _factor(trained, "2").flatten(1)
        return KroneckerUpdate(left, right, trained.factor(scaling))

    inputs = first[1] * second[1]
    whole_kernel = trained.has("lokr_w2") or trained.has("lokr_t2")
    rest: Shape | int = (inputs, *second[2:]) if whole_kernel else inputs
    parts = tuple(part for part in LOKR if trained.has(part))
    return Whole("lokr", (*parts, "alpha", "scalar"), first[0] * second[0], rest, load, adds=True)


LOKR = ("lokr_w2_b", "lokr_w1_b", "lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a", "lokr_t2")


def _factor_shape(trained: Trained, number: str) -> tuple[Shape, int | None]:
    """Of a factor, (rows, columns, kernel…) with what is known of the kernel, and its rank if it is a product."""
    whole, a, b, core = (f"lokr_{name}" for name in (f"w{number}", f"w{number}_a", f"w{number}_b", f"t{number}"))
    if trained.has(whole) == trained.has(a, b):
        raise trained.file.refuse(
            f"the factor w{number} of LoKr is there {'twice' if trained.has(whole) else 'in half, or not at all'}",
            tensor=next(iter(trained.module.keys.values())),
            expected=f"{whole}, or {a} and {b}",
        )
    if trained.has(whole):
        shape = trained.shape(whole)
        if len(shape) < 2:
            raise trained.disagree("a matrix or a kernel", whole)
        return shape, None
    left, right = trained.shape(a), trained.shape(b)
    rows, rank = (left[1:], left[:1]) if trained.has(core) else (left[:1], left[1:])
    if len(left) != 2 or len(right) != 2 or rank != right[:1] or rank == (0,):
        expected = "(r, rows) and (r, columns)" if trained.has(core) else "(rows, r) and (r, columns)"
        raise trained.disagree(expected, a, b)
    kernel: Shape = ()
    if trained.has(core):
        cube = trained.shape(core)
        kernel = cube[2:]
        if len(cube) < 3 or cube[:2] != rank * 2:
            raise trained.disagree("a core (r, r, kernel…)", core, b)
    return (*rows, right[1], *kernel), rank[0]


def _factor(trained: Trained, number: str) -> "torch.Tensor":
    whole, core = f"lokr_w{number}", f"lokr_t{number}"
    if trained.has(whole):
        return trained.read(whole)
    a, b = trained.read(f"{whole}_a"), trained.read(f"{whole}_b")
    if trained.has(core):
        return product("ab...,ao,bi->oi...", trained.read(core), a, b)
    return product("ij,jk->ik", a, b)


def read_lora(trained: Trained) -> list[Whole]:
    return [lora(trained), *([lora_bias(trained)] if trained.has("lora_up_bias") else []), *beside(trained)]


def read_loha(trained: Trained) -> list[Whole]:
    return [loha(trained), *beside(trained)]


def read_lokr(trained: Trained) -> list[Whole]:
    return [lokr(trained), *beside(trained)]
