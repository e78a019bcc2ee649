"""Several adapters as one change of each weight: their deltas mixed, pruned, brought to a lower rank.

A delta is what an adapter alone would make of the base, less the base, so kinds can be mixed: it is taken in
float64, where the difference is exact enough. TIES (arXiv:2306.01708) and DARE (arXiv:2311.03099) are about such
deltas, and so is `combine_on="deltas"`; PEFT's methods of the same names work on A and B apart, which "factors"
does: their product then holds terms BᵢAⱼ that no adapter had.
"""

from collections.abc import Sequence
from math import prod

from lora_export.contracts import Adapter, MergeOptions, TargetUpdate
from lora_export.errors import AdapterError, InputError
from lora_export.merging.planning.recipe import DECOMPOSITION, PRUNING, Recipe, Shape


def check_options(options: MergeOptions) -> None:
    """InputError for settings that a method lacks, or has no use for."""
    method, given = options.combine, f"--combine {options.combine}"
    if method == "none":
        asked = {
            "--density": options.density is not None,
            "--svd-rank": options.svd_rank is not None,
            "--combine-on factors": options.combine_on != "deltas",
        }
        unused = next((name for name, is_asked in asked.items() if is_asked), None)
        if unused:
            raise InputError(
                f"{unused} says how adapters are combined, and no method was asked for",
                expected="--combine beside it",
                next_step="the same command with --combine ties, or another method of `lora-export merge --help`",
            )
    elif method in PRUNING and (options.density is None or not 0 < options.density <= 1):
        raise InputError(
            f"{given} keeps a share of each delta, and --density is {options.density}",
            expected="a share above 0, up to 1",
            next_step="--density 0.2, as the TIES paper has it; DARE is often run with 0.1 to 0.5",
        )
    elif method not in PRUNING and options.density is not None:
        raise InputError(
            f"--density beside {given}, which prunes nothing",
            expected=f"it beside one of {', '.join(sorted(PRUNING))}",
            next_step="the same command without --density",
        )
    elif options.combine_on == "factors" and (method in ("cat", "svd") or options.svd_rank is not None):
        raise InputError(
            f"--combine-on factors beside {given}" + (" --svd-rank" if options.svd_rank is not None else ""),
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
    recipe = Recipe(target, parts, weights, tuple(owners), options, largest_rank(adapters))
    if options.combine_on == "factors":
        recipe.check_factors(adapters)
    elif recipe.decomposes and options.svd_rank is None:
        raise InputError(
            f"--combine svd, and of {kinds} not all have a rank that could be taken",
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
            recipe.load,
            optional=all(u.optional for u in updates),
            tied=any(u.tied for u in updates),
            row_wise=recipe.row_wise,
            copies=DECOMPOSITION if recipe.decomposes else 6 + 2 * len(parts),
            adds=all(u.adds for u in updates),
            wide=True,
            parts=parts,
        )
    ]


def largest_rank(adapters: Sequence[Adapter]) -> int:
    """As their configurations have it; 0 for kinds without one."""
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
            expected="a weight of 1, and no other adapter on it: a replaced weight is no delta",
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
    """Whether an update of a convolution's kernel is meant, where this shape is that kernel made flat."""
    return any(None not in s and len(s) > 2 and (s[0], prod(n or 1 for n in s[1:])) == shape for s in update.shapes)
