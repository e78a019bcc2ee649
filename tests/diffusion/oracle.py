"""What the tensors of each kind of adapter mean: random ones for a weight, and the exact weight that they make.

Written from the formulas of the formats, in float64, one module at a time, with nothing of lora_export. A slow test
holds the same tensors against the layers of LyCORIS and PEFT.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Parts = dict[str, Tensor]
Kind = Callable[[Tensor, Tensor | None, "Draw"], "Trained"]


@dataclass
class Draw:
    """Random tensors in the type of a file. rank, alpha: of this module, alpha None where the file does not say;
    tensor_alpha: it is stored, and so rounded, as a tensor of the file's type."""

    generator: torch.Generator
    dtype: torch.dtype = torch.float32
    rank: int = 4
    alpha: float | None = None
    tensor_alpha: bool = True
    strength: float = 1.0

    def normal(self, *shape: int, size: float = 1.0, mean: float = 0.0) -> Tensor:
        return (mean + size * torch.randn(shape, generator=self.generator)).to(self.dtype)

    def scale(self, rank: int) -> float:
        if self.alpha is None:
            return 1.0
        stored = float(torch.tensor(self.alpha, dtype=self.dtype)) if self.tensor_alpha else self.alpha
        return stored / rank


@dataclass
class Trained:
    """parts: part → stored tensor; weight, bias: exact, float64, None where the adapter leaves it as it is; the
    alpha is part of `parts` only where it means something else than a factor (OFT's constraint)."""

    parts: Parts
    weight: Tensor | None
    bias: Tensor | None = None
    has_alpha: bool = True


def lora(weight: Tensor, bias: Tensor | None, draw: Draw) -> Trained:
    parts, delta = _lora(weight, draw)
    return Trained(parts, weight + draw.strength * delta)


def _lora(weight: Tensor, draw: Draw) -> tuple[Parts, Tensor]:
    """down (r, in, k…), up (out, r, 1…)."""
    out, rest = weight.shape[0], weight.shape[1:]
    scale = draw.scale(draw.rank)
    down = draw.normal(draw.rank, *rest, size=rest.numel() ** -0.5)
    up = draw.normal(out, draw.rank, *[1] * (len(rest) - 1), size=0.3 / draw.rank**0.5 / scale)
    delta = (up.flatten(1).double() @ down.flatten(1).double()).reshape(weight.shape) * scale
    return {"lora_down": down, "lora_up": up}, delta


def _tucker(weight: Tensor, draw: Draw) -> tuple[Parts, Tensor]:
    out, inner, *kernel = weight.shape
    r, scale = draw.rank, draw.scale(draw.rank)
    ones = [1] * len(kernel)
    down = draw.normal(r, inner, *ones, size=inner**-0.5)
    up = draw.normal(out, r, *ones, size=0.4 / scale / r**0.5)
    mid = draw.normal(r, r, *kernel, size=0.5 / r**0.5)
    delta = torch.einsum("oa,ab...,bi->oi...", up.flatten(1).double(), mid.double(), down.flatten(1).double())
    return {"lora_down": down, "lora_up": up, "lora_mid": mid}, delta * scale


def _loha(weight: Tensor, draw: Draw) -> tuple[Parts, Tensor]:
    out, columns = weight.shape[0], weight[0].numel()
    r, scale = draw.rank, draw.scale(draw.rank)
    parts: Parts = {}
    product = torch.ones(out, columns, dtype=torch.float64)
    for n in "12":
        a = draw.normal(out, r, size=r**-0.5)
        b = draw.normal(r, columns, size=(0.3 / scale) ** 0.5 * columns**-0.25)
        parts |= {f"hada_w{n}_a": a, f"hada_w{n}_b": b}
        product = product * (a.double() @ b.double())
    return parts, product.reshape(weight.shape) * scale


def _loha_tucker(weight: Tensor, draw: Draw) -> tuple[Parts, Tensor]:
    out, inner, *kernel = weight.shape
    r, scale = draw.rank, draw.scale(draw.rank)
    parts: Parts = {}
    product = torch.ones(weight.shape, dtype=torch.float64)
    for n in "12":
        core = draw.normal(r, r, *kernel, size=0.2 / r)
        a, b = draw.normal(r, out), draw.normal(r, inner, size=0.7 / scale**0.5)
        parts |= {f"hada_t{n}": core, f"hada_w{n}_a": a, f"hada_w{n}_b": b}
        product = product * torch.einsum("ab...,ao,bi->oi...", core.double(), a.double(), b.double())
    return parts, product * scale


def _lokr(first: str, second: str, factor: int = 4) -> Callable[[Tensor, Draw], tuple[Parts, Tensor]]:
    """first: whole or split; second: whole, split or tucker."""

    def make(weight: Tensor, draw: Draw) -> tuple[Parts, Tensor]:
        out, inner, *kernel = weight.shape
        a, c = factor, min(factor, inner)
        b, d = out // a, inner // c
        assert a * b == out and c * d == inner, "the generator's own factors"
        r = draw.rank
        parts: Parts = {}
        if first == "whole":
            parts["lokr_w1"] = draw.normal(a, c, size=0.5)
            one = parts["lokr_w1"].double()
        else:
            parts["lokr_w1_a"], parts["lokr_w1_b"] = draw.normal(a, r, size=0.5), draw.normal(r, c, size=r**-0.5)
            one = parts["lokr_w1_a"].double() @ parts["lokr_w1_b"].double()
        scale = 1.0 if (first, second) == ("whole", "whole") else draw.scale(r)
        size = 0.5 / scale / weight[0].numel() ** 0.5
        if second == "whole":
            parts["lokr_w2"] = draw.normal(b, d, *kernel, size=size)
            two = parts["lokr_w2"].double().reshape(b, -1)
        elif second == "split":
            fan = weight[0].numel() // c
            parts["lokr_w2_a"], parts["lokr_w2_b"] = draw.normal(b, r, size=size), draw.normal(r, fan, size=r**-0.5)
            two = parts["lokr_w2_a"].double() @ parts["lokr_w2_b"].double()
        else:
            parts["lokr_t2"] = draw.normal(r, r, *kernel, size=1 / r)
            parts["lokr_w2_a"], parts["lokr_w2_b"] = draw.normal(r, b, size=size), draw.normal(r, d)
            core, left, right = (parts[f"lokr_{n}"].double() for n in ("t2", "w2_a", "w2_b"))
            two = torch.einsum("mn...,mb,nd->bd...", core, left, right).reshape(b, -1)
        # A Kronecker product over rows and input channels: the kernel stays inside the second factor.
        whole = torch.einsum("ac,bdk->abcdk", one, two.reshape(b, d, -1))
        return parts, whole.reshape(weight.shape) * scale

    return make


def _glora(weight: Tensor, draw: Draw) -> tuple[Parts, Tensor]:
    out, inner, *kernel = weight.shape
    r, scale, ones = draw.rank, draw.scale(draw.rank), [1] * len(kernel)
    a1, a2 = draw.normal(inner, r, *ones, size=0.3), draw.normal(r, inner, *ones, size=0.3 / scale / inner**0.5)
    b1 = draw.normal(out, r, *ones, size=0.3 / scale)
    b2 = draw.normal(r, inner, *kernel, size=weight[0].numel() ** -0.5)
    inside = a1.flatten(1).double() @ a2.flatten(1).double()
    delta = torch.einsum("oi...,ij->oj...", weight, inside)
    delta = delta + (b1.flatten(1).double() @ b2.flatten(1).double()).reshape(weight.shape)
    return {"a1": a1, "a2": a2, "b1": b1, "b2": b2}, delta * scale


_ADDITIVE: dict[str, Callable[[Tensor, Draw], tuple[Parts, Tensor]]] = {
    "lora": _lora,
    "tucker": _tucker,
    "loha": _loha,
    "loha_tucker": _loha_tucker,
    "lokr": _lokr("whole", "whole"),
    "lokr_w2_split": _lokr("whole", "split"),
    "lokr_w1_split": _lokr("split", "whole"),
    "lokr_both_split": _lokr("split", "split"),
    "lokr_tucker": _lokr("whole", "tucker"),
    "lokr_tucker_w1_split": _lokr("split", "tucker", 2),
    "glora": _glora,
}


def _additive(name: str) -> Kind:
    def make(weight: Tensor, bias: Tensor | None, draw: Draw) -> Trained:
        parts, delta = _ADDITIVE[name](weight, draw)
        return Trained(parts, weight + draw.strength * delta)

    return make


def _dora(name: str, rows: bool) -> Kind:
    """(W + Δ) · m / ‖W + Δ‖, the norms over all but rows, or over all but the second dimension."""

    def make(weight: Tensor, bias: Tensor | None, draw: Draw) -> Trained:
        parts, delta = _ADDITIVE[name](weight, draw)
        adapted = weight + delta
        kept = 0 if rows else 1
        others = [d for d in range(weight.dim()) if d != kept]
        norm = adapted.square().sum(dim=others, keepdim=True).sqrt()
        base = weight.square().sum(dim=others, keepdim=True).sqrt()
        magnitude = (base * (1 + 0.1 * torch.randn(base.shape, generator=draw.generator))).to(draw.dtype)
        return Trained({**parts, "dora_scale": magnitude}, adapted * magnitude.double() / norm)

    return make


def dora_peft(weight: Tensor, bias: Tensor | None, draw: Draw) -> Trained:
    """PEFT's DoRA: the magnitudes are a vector, one a row."""
    made = _dora("lora", True)(weight, bias, draw)
    made.parts["magnitude"] = made.parts.pop("dora_scale").flatten()
    return made


def _ia3(on_input: bool) -> Kind:
    def make(weight: Tensor, bias: Tensor | None, draw: Draw) -> Trained:
        side = 1 if on_input else 0
        n, ones = weight.shape[side], [1] * (weight.dim() - 2)
        value = draw.normal(n, size=0.2)
        factor = (1 + value.double()).reshape((1, n, *ones) if on_input else (n, 1, *ones))
        flag = torch.tensor(int(on_input)).to(torch.int64 if draw.dtype == torch.float32 else draw.dtype)
        stored = value.reshape(1, n, *ones) if ones else value
        return Trained({"weight": stored, "on_input": flag}, weight * factor, has_alpha=False)

    return make


def _oft(butterfly: bool, constraint: float = 0.0, rescaled: bool = False) -> Kind:
    """R = (I + Q)(I − Q)⁻¹ with Q = B − Bᵀ: Rᵀ W block by block; a butterfly: R W, m times with growing strides."""

    def make(weight: Tensor, bias: Tensor | None, draw: Draw) -> Trained:
        out, size = weight.shape[0], 4
        blocks = out // size
        times = [(blocks - 1).bit_count() + 1] if butterfly else []
        stored = draw.normal(*times, blocks, size, size, size=0.15)
        q = stored.double() - stored.double().mT
        limit = float(torch.tensor(constraint, dtype=draw.dtype)) * out
        length = q.square().sum().sqrt() + 1e-8
        if limit > 0 and length > limit:
            q = q * (limit / length)
        eye = torch.eye(size, dtype=torch.float64)
        turn = (eye + q) @ torch.linalg.inv(eye - q)
        flat = weight.reshape(out, -1)
        if butterfly:
            for i in range(times[0]):
                order = _butterfly_order(out, size, 2**i * (size // 2))
                turned = (turn[i] @ flat[order].reshape(blocks, size, -1)).reshape(out, -1)
                flat = torch.empty_like(flat)
                flat[order] = turned
        else:
            flat = (turn.mT @ flat.reshape(blocks, size, -1)).reshape(out, -1)
        parts = {"oft_blocks": stored, "alpha": torch.tensor(constraint, dtype=draw.dtype)}
        after = flat.reshape(weight.shape)
        if rescaled:
            parts["rescale"] = draw.normal(out, *[1] * (weight.dim() - 1), size=0.1, mean=1.0)
            after = after * parts["rescale"].double()
        return Trained(parts, after, has_alpha=False)

    return make


def _butterfly_order(rows: int, size: int, stride: int) -> Tensor:
    """Which row stands where before a turn: rows that are `stride` apart come beside each other."""
    grid = torch.arange(rows).reshape(-1, 2, stride)
    return grid.transpose(1, 2).reshape(-1)


def full(weight: Tensor, bias: Tensor | None, draw: Draw) -> Trained:
    diff = draw.normal(*weight.shape, size=0.2 / weight[0].numel() ** 0.5)
    made = Trained({"diff": diff}, weight + draw.strength * diff.double(), has_alpha=False)
    return _with_bias(made, bias, draw)


def lora_and_bias(weight: Tensor, bias: Tensor | None, draw: Draw) -> Trained:
    """`diff_b` beside a LoRA: the bias has no scale."""
    return _with_bias(lora(weight, bias, draw), bias, draw)


def _with_bias(made: Trained, bias: Tensor | None, draw: Draw) -> Trained:
    if bias is not None:
        made.parts["diff_b"] = draw.normal(*bias.shape, size=0.05)
        made.bias = bias + draw.strength * made.parts["diff_b"].double()
    return made


def lora_up_bias(weight: Tensor, bias: Tensor | None, draw: Draw) -> Trained:
    """PEFT's lora_bias: the bias of `lora_B` has the scale of the product."""
    made = lora(weight, bias, draw)
    if bias is not None:
        made.parts["lora_up_bias"] = draw.normal(*bias.shape, size=0.05)
        added = made.parts["lora_up_bias"].double() * draw.scale(draw.rank)
        made.bias = bias + draw.strength * added
    return made


def norm(weight: Tensor, bias: Tensor | None, draw: Draw) -> Trained:
    parts = {"w_norm": draw.normal(*weight.shape, size=0.1)}
    made = Trained(parts, weight + draw.strength * parts["w_norm"].double(), has_alpha=False)
    if bias is not None:
        parts["b_norm"] = draw.normal(*bias.shape, size=0.1)
        made.bias = bias + draw.strength * parts["b_norm"].double()
    return made


def replaced(weight: Tensor, bias: Tensor | None, draw: Draw) -> Trained:
    value = draw.normal(*weight.shape, size=weight[0].numel() ** -0.5)
    return Trained({"set_weight": value}, value.double(), has_alpha=False)


def zero(weight: Tensor, bias: Tensor | None, draw: Draw) -> Trained:
    """A module that training left alone: up is zero."""
    made = lora(weight, bias, draw)
    made.parts["lora_up"] = torch.zeros_like(made.parts["lora_up"])
    return Trained(made.parts, weight.clone())


@dataclass(frozen=True)
class Maker:
    """make: of a kind; takes: whether it fits a weight of this many dimensions with these rows and kernel."""

    make: Kind
    takes: Callable[[torch.Size], bool] = field(default=lambda shape: len(shape) >= 2)


def _kernel(shape: torch.Size) -> bool:
    return len(shape) > 2 and any(n > 1 for n in shape[2:])


def _fours(shape: torch.Size) -> bool:
    return len(shape) >= 2 and shape[0] % 16 == 0 and shape[1] % 4 == 0


def _power(shape: torch.Size) -> bool:
    return len(shape) >= 2 and shape[0] % 8 == 0 and shape[0] & (shape[0] - 1) == 0


KINDS: dict[str, Maker] = {
    **{name: Maker(_additive(name)) for name in ("lora", "loha", "glora")},
    **{name: Maker(_additive(name), _kernel) for name in ("tucker", "loha_tucker")},
    **{
        name: Maker(_additive(name), _fours)
        for name in ("lokr", "lokr_w2_split", "lokr_w1_split", "lokr_both_split")
    },
    **{
        name: Maker(_additive(name), lambda s: _fours(s) and _kernel(s))
        for name in ("lokr_tucker", "lokr_tucker_w1_split")
    },
    "dora_rows": Maker(_dora("lora", True)),
    "dora_columns": Maker(_dora("lora", False)),
    "dora_tucker": Maker(_dora("tucker", True), _kernel),
    "dora_loha_rows": Maker(_dora("loha", True)),
    "dora_loha_columns": Maker(_dora("loha", False)),
    "dora_lokr_rows": Maker(_dora("lokr_w2_split", True), _fours),
    "dora_lokr_columns": Maker(_dora("lokr_w2_split", False), _fours),
    "dora_peft": Maker(dora_peft, lambda s: len(s) == 2),
    "ia3_rows": Maker(_ia3(False)),
    "ia3_columns": Maker(_ia3(True)),
    "oft": Maker(_oft(False), lambda s: len(s) >= 2 and s[0] % 4 == 0),
    "oft_constraint": Maker(_oft(False, constraint=0.01), lambda s: len(s) >= 2 and s[0] % 4 == 0),
    "oft_rescaled": Maker(_oft(False, rescaled=True), lambda s: len(s) >= 2 and s[0] % 4 == 0),
    "boft": Maker(_oft(True), _power),
    "boft_rescaled": Maker(_oft(True, constraint=0.02, rescaled=True), _power),
    "full": Maker(full),
    "lora_and_bias": Maker(lora_and_bias),
    "lora_up_bias": Maker(lora_up_bias, lambda s: len(s) == 2),
    "norm": Maker(norm, lambda s: len(s) == 1),
    "replaced": Maker(replaced, lambda s: len(s) >= 1),
    "replaced_norm": Maker(replaced, lambda s: len(s) == 1),
    "zero": Maker(zero),
}
