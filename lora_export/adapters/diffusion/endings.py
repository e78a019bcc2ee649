"""The endings of tensor names in adapter files of image models: which part of which module a tensor is."""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from lora_export.adapters.kind import AdapterFile
from lora_export.errors import AdapterError

# PEFT puts the adapter's own name between the part and its leaf: lora_A.default.weight.
_ADAPTER = r"(?:\.(?!(?:weight|bias)(?:\.|$))(?P<adapter>[^.]+))?"
_PARTS = {
    "lora_A": "lora_down",
    "lora_B": "lora_up",
    "lora_down": "lora_down",
    "lora_up": "lora_up",
    "lora_mid": "lora_mid",
    "down": "lora_down",
    "up": "lora_up",
    "lora_magnitude_vector": "magnitude",
    **{f"{glora}.weight": glora for glora in ("a1", "a2", "b1", "b2")},
}
_BARE = (
    "alpha", "dora_scale", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "on_input",
    "diff", "diff_b", "diff_m", "set_weight", "w_norm", "b_norm", "oft_blocks", "rescale", "reshape_weight",
    "scalar",
)  # fmt: skip
_ENDINGS = tuple(
    re.compile(rf"(?P<spelling>.+?){ending}")
    for ending in (
        rf"\.(?P<part>lora_A|lora_B|lora_down|lora_up|lora_mid){_ADAPTER}(?:\.(?P<leaf>weight|bias))?",
        r"(?:\.lora|\.lora_linear_layer|(?<!\.qkv)(?<!\.proj)_lora)\.(?P<part>alpha)",
        rf"\.(?P<part>{'|'.join(_BARE)})(?:\.(?P<adapter>default))?",
        # XLabs numbers its streams, and the number belongs to the module: qkv_lora1.down.weight.
        r"(?<=\.processor)(?P<tail>\.(?:qkv|proj)_lora[12]?)\.(?P<part>down|up)\.(?P<leaf>weight)",
        r"(?:\.lora_linear_layer|\.lora|_lora)\.(?P<part>down|up)\.(?P<leaf>weight)",
        rf"\.(?P<part>lora_magnitude_vector){_ADAPTER}(?:\.weight)?",
        r"\.(?P<part>[ab][12]\.weight)",
    )
)
# Black Forest Labs' control files hold whole scales of norms beside their LoRA, which replace the base's.
_SCALE = re.compile(r"(?P<spelling>.*norm\.(?:query|key)_norm)\.scale")
_COMPLETE = {
    "lora_down": ("lora_up",),
    "lora_up": ("lora_down",),
    "lora_mid": ("lora_down", "lora_up"),
    "lora_up_bias": ("lora_up",),
    "reshape_weight": ("lora_up",),
    "hada_w1_a": ("hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "hada_w1_b": ("hada_w1_a",),
    "hada_w2_a": ("hada_w1_a",),
    "hada_w2_b": ("hada_w1_a",),
    "hada_t1": ("hada_t2", "hada_w1_a"),
    "hada_t2": ("hada_t1", "hada_w1_a"),
    "lokr_w1_a": ("lokr_w1_b",),
    "lokr_w1_b": ("lokr_w1_a",),
    "lokr_w2_a": ("lokr_w2_b",),
    "lokr_w2_b": ("lokr_w2_a",),
    "lokr_t2": ("lokr_w2_a", "lokr_w2_b"),
    "a1": ("a2", "b1", "b2"),
    "a2": ("a1",),
    "b1": ("a1",),
    "b2": ("a1",),
    "weight": ("on_input",),
    "on_input": ("weight",),
    "rescale": ("oft_blocks",),
}
# Parts of which a file holds one kind for a module; what stands beside a kind is in none of them.
_KINDS = {
    "LoRA": ("lora_down",),
    "LoHa": ("hada_w1_a",),
    "LoKr": ("lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a"),
    "GLoRA": ("a1",),
    "IA³": ("on_input",),
    "OFT": ("oft_blocks",),
    "a full difference": ("diff",),
    "a difference of a parameter": ("diff_m",),
    "a replacement": ("set_weight",),
    "a norm": ("w_norm", "b_norm"),
}
_ADDITIVE = ("LoRA", "LoHa", "LoKr", "GLoRA", "a full difference")
# Products of such factors are the update, or a term of it: (kind's parts), and each term's.
PRODUCTS = (
    (("lora_up", "lora_mid", "lora_down"),),
    (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),),
    (("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),),
    (("a1", "a2"), ("b1", "b2")),
)


@dataclass(frozen=True)
class Ending:
    """spelling: of the module; part: normalised; adapter: PEFT's name of it, where the tensor's name has one."""

    spelling: str
    part: str
    adapter: str | None = None


def split(name: str) -> Ending | None:
    """The module's spelling and the part that a tensor's name says; None for an ending that is not known."""
    for pattern in _ENDINGS:
        if match := pattern.fullmatch(name):
            found = match.groupdict()
            part = _PARTS.get(found["part"], found["part"])
            if found.get("leaf") == "bias":
                if part != "lora_up":
                    return None
                part = "lora_up_bias"
            return Ending(found["spelling"] + (found.get("tail") or ""), part, found.get("adapter"))
    if match := _SCALE.fullmatch(name):
        return Ending(match["spelling"], "set_weight")
    return None


def grouped(file: AdapterFile, names: Collection[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Spelling of a module → part → tensor, and the tensors whose endings are not known.

    AdapterError for two tensors of one part, and for the adapters of several names in one file.
    """
    groups: dict[str, dict[str, str]] = {}
    others, adapters = [], set()
    for name in names:
        ending = split(name)
        if ending is None:
            others.append(name)
            continue
        if ending.adapter is not None:
            adapters.add(ending.adapter)
        parts = groups.setdefault(ending.spelling, {})
        if ending.part in parts:
            raise file.refuse(
                f"two tensors have the same meaning, {parts[ending.part]} and {name}",
                tensor=name,
                expected="one of them",
            )
        parts[ending.part] = name
    if len(adapters) > 1:
        raise file.refuse(
            f"the file holds several adapters: {', '.join(sorted(adapters))}", expected="one adapter in a file"
        )
    return groups, _ia3(groups, others)


def _ia3(groups: dict[str, dict[str, str]], others: list[str]) -> list[str]:
    """LyCORIS' IA³ calls its vector `weight`, as whole weights are called; `on_input` beside it tells."""
    left = []
    for name in others:
        spelling, _, leaf = name.rpartition(".")
        if leaf == "weight" and "on_input" in groups.get(spelling, {}):
            groups[spelling]["weight"] = name
        else:
            left.append(name)
    return left


def refuse_incomplete(file: AdapterFile, spelling: str, keys: Mapping[str, str]) -> None:
    """AdapterError for half a pair, an alpha without factors, and parts of two kinds."""
    for part, needs in _COMPLETE.items():
        if part in keys:
            missing = [n for n in needs if n not in keys]
            if missing:
                raise _half(file, spelling, keys, part, missing)
    present = [kind for kind, parts in _KINDS.items() if any(p in keys for p in parts)]
    if len(present) > 1:
        raise file.refuse(
            f"{spelling} has tensors of {' and '.join(present)}",
            tensor=next(iter(keys.values())),
            expected="one kind for a module",
        )
    for side in ("1", "2"):
        whole, made = f"lokr_w{side}", f"lokr_w{side}_a"
        if "LoKr" in present and (whole in keys) == (made in keys):
            have = "both a whole and a decomposed" if whole in keys else "no"
            raise file.refuse(
                f"{spelling} has {have} factor {side} of its Kronecker product",
                tensor=next(iter(keys.values())),
                expected=f"{whole}, or {made} and {whole}_b",
            )
    for part in ("dora_scale", "magnitude"):
        if part in keys and not any(kind in _ADDITIVE for kind in present):
            raise _half(file, spelling, keys, part, ["lora_down", "lora_up"])
    if not present and "diff_b" not in keys:
        part = next(iter(keys))
        raise _half(file, spelling, keys, part, ["the factors"])


def _half(file: AdapterFile, spelling: str, keys: Mapping[str, str], part: str, missing: list[str]) -> AdapterError:
    return file.refuse(
        f"{spelling} has {part} without {', '.join(missing)}",
        tensor=keys[part],
        expected=f"all parts of a module; it has only {', '.join(sorted(keys))}",
        next_step="download the file again, or save it again with its trainer",
    )


def terms(keys: Mapping[str, str]) -> Iterator[list[str]]:
    """The tensors of each term of an update that alpha scales: the term is zero where one of them is."""
    for products in PRODUCTS:
        for parts in products:
            if found := [keys[p] for p in parts if p in keys]:
                yield found
