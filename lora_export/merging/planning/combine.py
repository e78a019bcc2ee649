"""Several adapters as one change of each weight: their deltas mixed, pruned, truncated to a lower rank.

A delta is what an adapter alone would make of the base, minus the base, so kinds can be mixed. It is computed in
float64, where the difference is exact enough. TIES (arXiv:2306.01708) and DARE (arXiv:2311.03099) are about such
deltas, and so is `combine_on="deltas"`; PEFT's methods of the same names work on A and B separately, as
"factors" does: their product then has terms BᵢAⱼ that no adapter had.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import copysign, prod, sqrt
from typing import TYPE_CHECKING

from lora_export.adapters.updates import LowRank, LowRankUpdate, low_rank_of
from lora_export.contracts import Adapter, MergeOptions, TargetUpdate, Update
from lora_export.deltas import spectrum
from lora_export.deltas.draws import drawn
from lora_export.deltas.largest import least_kept
from lora_export.deltas.mixing import agreed, summed
from lora_export.errors import AdapterError, InputError
from lora_export.storage.workers import BLOCK

if TYPE_CHECKING:
    import torch

PRUNING = frozenset({"ties", "dare_linear", "dare_ties", "magnitude_prune"})
RANDOM = frozenset({"dare_linear", "dare_ties"})
ELECTING = frozenset({"ties", "dare_ties"})
DECOMPOSITION = 20  # copies in fp32: of the matrix, its Gram matrix, its vectors and its products, in float64

Shape = tuple[int, ...]


def check_options(options: MergeOptions) -> None:
    """InputError for settings that a method lacks or does not use."""
    method, given = options.combine, f"--combine {options.combine}"
    if method == "none":
        given_with = {
            "--density": options.density is not None,
            "--svd-rank": options.svd_rank is not None,
            "--combine-on factors": options.combine_on != "deltas",
        }
        unused = next((name for name, is_given in given_with.items() if is_given), None)
        if unused:
            raise InputError(
                f"{unused} says how adapters are combined, but there is no --combine",
                expected="--combine as well",
                next_step="the same command with --combine ties, or another method of `lora-export merge --help`",
            )
    elif method in PRUNING and (options.density is None or not 0 < options.density <= 1):
        raise InputError(
            f"{given} keeps a share of each delta, and --density is {options.density}",
            expected="a share above 0, up to 1",
            next_step="--density 0.2, as in the TIES paper; DARE is often run with 0.1 to 0.5",
        )
    elif method not in PRUNING and options.density is not None:
        raise InputError(
            f"--density with {given}, which prunes nothing",
            expected=f"--density with one of {', '.join(sorted(PRUNING))}",
            next_step="the same command without --density",
        )
    elif options.combine_on == "factors" and (method in ("cat", "svd") or options.svd_rank is not None):
        raise InputError(
            f"--combine-on factors with {given}" + (" --svd-rank" if options.svd_rank is not None else ""),
            expected="deltas: concatenating factors adds the deltas, and an SVD is of their sum",
            next_step="the same command without --combine-on",
        )


def combined(
    target: str, updates: Sequence[TargetUpdate], adapters: Sequence[Adapter], options: MergeOptions
) -> list[TargetUpdate]:
    """The updates of one weight as a single one. A replaced weight stays as it is, if one adapter alone has it."""
    owners = sorted({u.owner for u in updates})
    if any(u.replaces for u in updates):
        _check_replaced(target, updates, adapters)
        return list(updates)
    parts = tuple(tuple(u for u in updates if u.owner == owner) for owner in owners)
    weights = tuple(adapters[owner].weight for owner in owners)
    kinds = " + ".join("/".join(dict.fromkeys(u.kind for u in part)) for part in parts)
    combination = Combination(target, parts, weights, tuple(owners), options, largest_rank(adapters))
    if options.combine_on == "factors":
        combination.check_factors(adapters)
    elif combination.decomposes and options.svd_rank is None:
        raise InputError(
            f"--combine svd, but not all of {kinds} have a rank that could be used",
            tensor=target,
            expected="the rank of the result",
            next_step="--svd-rank 16",
        )
    return [
        TargetUpdate(
            target,
            f"{options.combine} of {kinds}",
            tuple(key for u in updates for key in u.keys),
            _common_shapes(target, updates),
            combination.load,
            optional=all(u.optional for u in updates),
            tied=any(u.tied for u in updates),
            row_wise=combination.row_wise,
            copies=DECOMPOSITION if combination.decomposes else 6 + 2 * len(parts),
            adds=all(u.adds for u in updates),
            wide=True,
            parts=parts,
        )
    ]


def largest_rank(adapters: Sequence[Adapter]) -> int:
    """The largest rank in their configurations; 0 for kinds without one."""
    ranks = [
        rank for a in adapters for rank in (a.config.get("init_r"), a.config.get("r")) if isinstance(rank, int)
    ]
    return max(ranks, default=0)


def _check_replaced(target: str, updates: Sequence[TargetUpdate], adapters: Sequence[Adapter]) -> None:
    owners = {u.owner for u in updates}
    weight = adapters[min(owners)].weight
    if len(owners) > 1 or weight != 1.0:
        why = f"and its weight is {weight:g}" if len(owners) == 1 else "and another adapter changes it"
        raise AdapterError(
            f"an adapter replaces this weight as a whole (modules_to_save, a trained bias), {why}",
            where=adapters[min(owners)].folder,
            tensor=target,
            expected="a weight of 1, and no other adapter on it: a replaced weight is not a delta",
            next_step="merge that adapter alone first, and the others into the result",
        )


def _common_shapes(target: str, updates: Sequence[TargetUpdate]) -> tuple[tuple[int | None, ...], ...]:
    """The shapes that all updates fit, as the first one spells them."""
    first, *others = updates

    def fits_all(shape: tuple[int | None, ...]) -> bool:
        known = tuple(n or 1 for n in shape)
        return None in shape or all(u.fits(known) or _flat_fits(u, known) for u in others)

    common = tuple(s for s in first.shapes if fits_all(s))
    if not common:
        raise AdapterError(
            f"the adapters fit weights of different shapes, {first.shapes[0]} and {others[0].shapes[0]}",
            tensor=target,
            expected="adapters of one base",
        )
    return common


def _flat_fits(update: TargetUpdate, shape: Shape) -> bool:
    """Whether the update is of a convolution's kernel of which this shape is the flattened form."""
    return any(None not in s and len(s) > 2 and (s[0], prod(n or 1 for n in s[1:])) == shape for s in update.shapes)


@dataclass(frozen=True)
class Combination:
    """How the combined update of one weight is made of what adapters[owners[i]] does with it: parts[i].

    largest: the largest rank of an adapter, which svd truncates to by default.
    """

    target: str
    parts: tuple[tuple[TargetUpdate, ...], ...]
    weights: tuple[float, ...]
    owners: tuple[int, ...]
    options: MergeOptions
    largest: int = 0

    @property
    def adds(self) -> bool:
        return all(u.adds for part in self.parts for u in part)

    @property
    def truncates(self) -> bool:
        """Whether the result is truncated to a rank."""
        return self.options.combine == "svd" or self.options.svd_rank is not None

    @property
    def stays_factored(self) -> bool:
        """Whether the sum of the deltas follows from their factors, without a matrix of the weight's size."""
        return self.options.combine not in PRUNING and self.factored

    @property
    def factored(self) -> bool:
        """Whether each adapter has one pair of factors here."""
        return all(len(part) == 1 and part[0].low_rank for part in self.parts)

    @property
    def decomposes(self) -> bool:
        """Whether it takes the singular values of a whole matrix."""
        return self.truncates and not self.stays_factored

    def row_wise(self, shape: Shape) -> bool:
        if self.options.combine_on == "factors" or self.stays_factored:
            return True
        needs_all = self.options.combine in PRUNING - RANDOM and not self.adds
        return not (self.decomposes or needs_all) and all(u.row_wise(shape) for p in self.parts for u in p)

    def check_factors(self, adapters: Sequence[Adapter]) -> None:
        """AdapterError where there are no factors to combine, or of different ranks."""
        for part, owner in zip(self.parts, self.owners, strict=True):
            adapter = adapters[owner]
            if len(part) != 1 or not part[0].low_rank:
                raise AdapterError(
                    f"--combine-on factors, but this is {part[0].kind}",
                    where=adapter.folder,
                    tensor=self.target,
                    expected="LoRA's A and B",
                    next_step="the same command without --combine-on: deltas of all kinds can be combined",
                )
        ranks = [adapters[o].tensors[p[0].keys[0]].shape[0] for p, o in zip(self.parts, self.owners, strict=True)]
        if len(set(ranks)) > 1:
            raise AdapterError(
                f"--combine-on factors, but the ranks here are {' and '.join(map(str, ranks))}",
                where=adapters[self.owners[-1]].folder,
                tensor=self.target,
                expected="one rank: matrices of different shapes cannot be added",
                next_step="the same command without --combine-on, or --combine cat",
            )

    def load(self, shape: Shape) -> Update:
        loaded = tuple(tuple(u.load(shape) for u in part) for part in self.parts)
        if self.options.combine_on == "factors":
            return LowRankUpdate(self._factors(loaded))
        if self.stays_factored:
            return LowRankUpdate(self._concatenated(loaded))
        return self.update_of(loaded, shape)

    def update_of(self, loaded: tuple[tuple[Update, ...], ...], shape: Shape) -> "CombinedUpdate":
        experts = any("expert" in u.kind or u.kind == "lora_stacked" for p in self.parts for u in p)
        update = CombinedUpdate(self, loaded, shape, experts=experts)
        return replace(update, least=update.limits(None)) if self.adds else update

    def _concatenated(self, loaded: Sequence[Sequence[Update]]) -> LowRank:
        """[w₁s₁B₁ w₂s₂B₂ …]·[A₁ A₂ …], truncated where a lower rank is wanted."""
        import torch

        lows = [low_rank_of(part[0]).double() for part in loaded]
        left = torch.cat([w * low.scaling * low.left for w, low in zip(self.weights, lows, strict=True)], dim=1)
        right = torch.cat([low.right for low in lows])
        if self.truncates:
            left, right = spectrum.of_factors(left, right).factors(self.options.svd_rank or self.largest)
        return LowRank(left, right, 1.0)

    def _factors(self, loaded: Sequence[Sequence[Update]]) -> LowRank:
        """A and B combined separately, each with √|w·s|, and the sign of w·s in A, as PEFT does it."""
        lows = [low_rank_of(part[0]).double() for part in loaded]
        scales = [w * low.scaling for w, low in zip(self.weights, lows, strict=True)]
        roots = [sqrt(abs(s)) for s in scales]
        left = self._mixed_whole([low.left for low in lows], roots, "B")
        signed = [copysign(root, s) for root, s in zip(roots, scales, strict=True)]
        return LowRank(left, self._mixed_whole([low.right for low in lows], signed, "A"), 1.0)

    def _mixed_whole(
        self, matrices: Sequence["torch.Tensor"], weights: Sequence[float], what: str
    ) -> "torch.Tensor":
        pruned = []
        for i, matrix in enumerate(matrices):
            least = None
            if self.options.combine in PRUNING - RANDOM:
                kept = int(float(self.options.density or 0) * matrix.numel())
                rows = partial(_rows, matrix)
                least = least_kept(rows, [(0, len(matrix))], kept, matrix.numel())
            pruned.append(self.pruned(matrix, i, least, 0, f"{self.target}/{what}"))
        return self.mixed(pruned, weights)

    def pruned(
        self, delta: "torch.Tensor", which: int, least: float | None, start: int, name: str
    ) -> "torch.Tensor":
        """What is kept of rows of the delta from element `start` on; a random choice is scaled up again."""
        import torch

        density = float(self.options.density or 1)
        if self.options.combine in RANDOM and density < 1:
            stays = drawn(self.options.seed, name, self.owners[which], density, start, tuple(delta.shape))
            return torch.where(stays.to(delta.device), delta / density, 0.0)
        return delta if least is None else torch.where(delta.abs() >= least, delta, 0.0)

    def mixed(self, deltas: Sequence["torch.Tensor"], weights: Sequence[float]) -> "torch.Tensor":
        if self.options.combine in ELECTING:
            return agreed(deltas, weights, self.options.majority_sign)
        return summed(deltas, weights)


@dataclass(frozen=True)
class CombinedUpdate:
    """W + the mixture of deltas, each of which is computed for the rows at hand.

    loaded: the updates of each adapter; least: the magnitude from which an element of each delta is kept (empty: it
    takes the whole weight to find out); experts: the first dimension counts matrices.
    """

    combination: Combination
    loaded: tuple[tuple[Update, ...], ...]
    shape: Shape
    least: tuple[float, ...] = ()
    experts: bool = False

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        import torch

        combination, limits = self.combination, self.least or self.limits(weight)
        start = rows.start * prod(self.shape[1:])
        deltas = []
        for i in range(len(self.loaded)):
            least = limits[i] if limits else None
            deltas.append(combination.pruned(self.delta(i, weight, rows), i, least, start, combination.target))
        change = combination.mixed(deltas, combination.weights)
        if combination.options.svd_rank is not None:
            change = self._of_rank(change, combination.options.svd_rank)
        changed: torch.Tensor = weight + change
        return changed

    def terms(self, weight: "torch.Tensor", terms: "torch.Tensor", rows: slice) -> "torch.Tensor":
        """|W| and |W'|: everything between them is float64, so nothing else is rounded."""
        return terms + self.apply(weight, rows).abs()

    def delta(self, which: int, weight: "torch.Tensor | None", rows: slice) -> "torch.Tensor":
        """Rows of what one adapter changes, float64. weight: those of the base; None where it does not matter."""
        import torch

        height = rows.stop - rows.start
        if weight is None or self.combination.adds:
            device = "cpu" if weight is None else weight.device
            weight = torch.zeros((height, *self.shape[1:]), dtype=torch.float64, device=device)
            return self._applied(which, weight, rows)
        return self._applied(which, weight.clone(), rows) - weight

    def _applied(self, which: int, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        shape = weight.shape
        for update in self.loaded[which]:
            weight = update.apply(weight, rows).reshape(shape)
        return weight

    def runs(self) -> list[tuple[int, int]]:
        """All rows, in blocks of which each core may have several in memory."""
        height, width = self.shape[0], prod(self.shape[1:])
        step = max(1, BLOCK // 16 // max(1, width))
        if not all(u.row_wise(self.shape) for part in self.combination.parts for u in part):
            step = max(1, height)
        return [(start, min(start + step, height)) for start in range(0, height, step)]

    def limits(self, weight: "torch.Tensor | None") -> tuple[float, ...]:
        """For each delta the magnitude from which an element is kept, where that depends on magnitudes."""
        options, total = self.combination.options, prod(self.shape)
        if options.combine not in PRUNING - RANDOM:
            return ()
        runs, kept = self.runs(), int(float(options.density or 0) * total)

        def block(which: int, start: int, stop: int) -> "torch.Tensor":
            return self.delta(which, None if weight is None else weight[start:stop], slice(start, stop)).cpu()

        return tuple(least_kept(partial(block, i), runs, kept, total) for i in range(len(self.loaded)))

    def _of_rank(self, change: "torch.Tensor", rank: int) -> "torch.Tensor":
        import torch

        if self.experts and change.dim() == 3:
            return torch.stack([_truncated(matrix, rank) for matrix in change])
        return _truncated(change.reshape(change.shape[0], -1), rank).reshape(change.shape)


def _truncated(matrix: "torch.Tensor", rank: int) -> "torch.Tensor":
    left, right = spectrum.of_matrix(matrix).factors(rank)
    return left @ right


def _rows(matrix: "torch.Tensor", start: int, stop: int) -> "torch.Tensor":
    return matrix[start:stop]
