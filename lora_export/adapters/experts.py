"""LoRA on parameters (`target_parameters`): fused experts W[e] + s·B[e]·A[e], and single matrices."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_export.adapters.config import LoraConfig, parse_lora
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.module import SAVE_AGAIN, AdaptedModule, modules
from lora_export.adapters.updates import LowRankUpdate
from lora_export.choices import ExpertPacking
from lora_export.contracts import TargetUpdate

if TYPE_CHECKING:
    import torch

NAME = "LoRA on fused experts"
FORMULA = "W[e] + s·B[e]·A[e]; A holds one expert after the other, B all experts of one rank after those of another"

_PARTS = ("lora_A", "lora_B")
_WRAPPER = ".base_layer"
# Several parameters of one module are wrapped in the order in which the module defines them, so the first one
# lies innermost and carries the most `.base_layer`. These are the orders of transformers' expert modules.
_DEFINED = ("gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "down_proj", "down_proj_bias")
_LAYOUTS: dict[str, ExpertPacking] = {"grouped_by_expert": "expert", "rank_major": "rank"}  # Unsloth's words
OUT_IN_SINCE = (0, 19)  # PEFT before this version called the middle dimension "in", whatever it was


@dataclass(frozen=True)
class ExpertsUpdate:
    """a: fp32 (experts, r, in); b: fp32 (experts, out, r). in_out: the weight is (experts, in, out)."""

    a: "torch.Tensor"
    b: "torch.Tensor"
    scaling: float
    in_out: bool

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        import torch

        left, right = self.b[rows], self.a[rows]
        if self.in_out:
            left, right = right.transpose(1, 2), left.transpose(1, 2)
        return torch.baddbmm(weight, left, right, alpha=self.scaling)

    def part(self, weight: "torch.Tensor", expert: int, rows: slice) -> "torch.Tensor":
        """The same for these rows of one expert, weight being (rows, …): of a few rows a small part of the work."""
        import torch

        left, right = self.b[expert], self.a[expert]
        if self.in_out:
            left, right = right.T, left.T
        return torch.addmm(weight, left[rows], right, alpha=self.scaling)


def claims(file: AdapterFile, module: str) -> bool:
    """Whether the matrices of this module (with its `.base_layer`s) belong to target_parameters."""
    return bool(_parameters(file, module.replace(_WRAPPER, "")))


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each parameter that target_parameters names and the file has matrices for."""
    if not file.config.get("target_parameters"):
        return []
    nested: dict[str, dict[int, AdaptedModule]] = {}
    for module in modules(file, *_PARTS):
        if claims(file, module.name):
            nested.setdefault(module.name.replace(_WRAPPER, ""), {})[module.name.count(_WRAPPER)] = module
    if not nested:
        if _base_has_none(file):  # PEFT names the experts of every variant of an architecture, dense ones too
            return []
        raise file.refuse(
            f"target_parameters names {', '.join(map(str, file.config['target_parameters']))}, "
            "but the file holds no matrices for them",
            expected="tensors such as …experts.lora_A.weight",
            next_step=SAVE_AGAIN,
        )
    config = parse_lora(file.config, file.where)
    return [u for owner, wrappers in nested.items() for u in _updates(file, config, owner, wrappers)]


def _base_has_none(file: AdapterFile) -> bool:
    """Whether the base is known and has neither experts nor a parameter of these names."""
    leaves = {str(t).rpartition(".")[2] for t in file.config["target_parameters"]}
    return bool(file.base_shapes) and not any(
        "experts" in name or name.rpartition(".")[2] in leaves for name in file.base_shapes
    )


def _parameters(file: AdapterFile, module: str) -> list[str]:
    """The parameters of this module that target_parameters names, in the order in which they are defined."""
    names = []
    for target in file.config.get("target_parameters") or ():
        owner, _, parameter = str(target).rpartition(".")
        # Without an owner PEFT asks each module whether it has the parameter; fused experts are all called so.
        if f".{module}".endswith(f".{owner or 'experts'}"):
            names.append(parameter)
    ordered = sorted(set(names), key=lambda n: (_DEFINED.index(n) if n in _DEFINED else len(_DEFINED), n))
    return ordered if len(ordered) < 2 or set(ordered) <= set(_DEFINED) else _as_defined(file, module, ordered)


def _as_defined(file: AdapterFile, module: str, names: list[str]) -> list[str]:
    """In the order of the architecture; as they are, to be refused, where it has no such parameters."""
    places = {n: i for i, n in enumerate(file.defined())}
    held = {n: next((p for p in places if f".{p}".endswith(f".{module}.{n}")), "") for n in names}
    return sorted(names, key=lambda n: places[held[n]]) if all(held.values()) else names


def _is_defined(file: AdapterFile, module: str, names: list[str]) -> bool:
    return all(any(f".{p}".endswith(f".{module}.{n}") for p in file.defined()) for n in names)


def _updates(
    file: AdapterFile, config: LoraConfig, owner: str, wrappers: dict[int, AdaptedModule]
) -> list[TargetUpdate]:
    """One update for each parameter of a module. wrappers: how many `.base_layer`s → the matrices there."""
    parameters = _parameters(file, owner)
    if sorted(wrappers) != list(range(len(parameters))):
        raise file.refuse(
            f"{len(wrappers)} pairs of matrices for the parameters {', '.join(parameters)}",
            tensor=owner,
            expected="one pair for each parameter in target_parameters",
        )
    unknown = [p for p in parameters if p not in _DEFINED]
    if len(parameters) > 1 and unknown and not _is_defined(file, owner, unknown):
        raise file.refuse(
            f"several parameters of one module, and the order of {unknown[0]!r} is not known",
            tensor=owner,
            expected=f"parameters among {', '.join(_DEFINED)}",
        )
    innermost_first = sorted(wrappers, reverse=True)
    return [
        _update(config, AdaptedModule(file, f"{owner}.{p}", wrappers[depth].keys), p)
        for p, depth in zip(parameters, innermost_first, strict=True)
    ]


def _update(config: LoraConfig, module: AdaptedModule, parameter: str) -> TargetUpdate:
    """module: of the parameter's name, `model.layers.0.mlp.experts.down_proj`."""
    file, target = module.file, module.name
    module.need(*_PARTS)
    if config.residual:
        raise file.refuse(
            f"{config.residual} on fused experts", tensor=target, expected="an adapter converted to plain LoRA"
        )
    a, b = (module.shape(p) for p in _PARTS)
    rank = config.fields.rank(target)
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] % rank:
        raise file.refuse(
            f"A {list(a)} and B {list(b)} are not of rank {rank} for each expert",
            tensor=target,
            expected="A of shape (experts·r, in) and B of shape (out, experts·r)",
        )
    experts, scaling = a[0] // rank, file.weight * config.scaling(target, rank)
    expert_major = experts > 1 and rank > 1 and _packing(file, parameter) == "expert"
    out_in, in_out = (experts, b[0], a[1]), (experts, a[1], b[0])

    def load(shape: tuple[int, ...]) -> ExpertsUpdate | LowRankUpdate:
        down, up = (module.read(p) for p in _PARTS)
        if len(shape) == 2:
            return LowRankUpdate.of(up, down, scaling)
        down = down.reshape(experts, rank, -1)
        if expert_major:
            up = up.reshape(-1, experts, rank).permute(1, 0, 2)
        else:
            up = up.reshape(-1, rank, experts).permute(2, 0, 1)
        flip = _square_is_in_out(file) if out_in == in_out else shape == in_out
        return ExpertsUpdate(down, up, scaling, flip)

    shapes: tuple[tuple[int, ...], ...] = (out_in, in_out)
    if experts == 1:
        shapes = (*shapes, (b[0], a[1]))
    return TargetUpdate(target, "lora_experts", module.used, shapes, load, adds=True)


def _packing(file: AdapterFile, parameter: str) -> ExpertPacking:
    """The user's word, else what Unsloth notes in the configuration, else PEFT's packing by rank.

    Refused: a note that contradicts the user or is not understood, and files of trainers that are known to have
    packed by expert without noting it.
    """
    noted = _noted_packing(file, parameter)
    if noted and file.expert_packing not in ("auto", noted):
        raise file.refuse(
            f"--expert-packing {file.expert_packing}, but the adapter says that {parameter} is packed by {noted}",
            expected="the packing of the training",
            next_step="drop --expert-packing",
        )
    if file.expert_packing != "auto":
        return file.expert_packing
    if noted is None and (_is_unsloth(file) or _is_megatron(file)):
        trainer = "Unsloth" if _is_unsloth(file) else "Megatron-Bridge"
        raise file.refuse(
            f"{trainer} has packed B of fused experts in two ways, and this file does not say in which",
            tensor=parameter,
            expected="--expert-packing",
            next_step="--expert-packing expert (Unsloth before September 2026, Megatron-Bridge), else rank; "
            "`lora-export validate` cannot tell, as PEFT always reads by rank: compare generated text",
        )
    return noted or "rank"


def _noted_packing(file: AdapterFile, parameter: str) -> ExpertPacking | None:
    notes = file.config.get("unsloth_fused_expert_lora")
    of_parameters = notes.get("parameters") if isinstance(notes, dict) else None
    own = of_parameters.get(parameter) if isinstance(of_parameters, dict) else None
    layout = own.get("lora_B_layout") if isinstance(own, dict) else file.config.get("lora_B_layout")
    if layout is None:
        return None
    if layout not in _LAYOUTS:
        raise file.refuse(
            f"lora_B_layout of {parameter} is {layout!r}",
            expected=" or ".join(_LAYOUTS),
            next_step="save the adapter again with a current Unsloth",
        )
    return _LAYOUTS[layout]


def _is_unsloth(file: AdapterFile) -> bool:
    mapping = file.config.get("auto_mapping")
    return isinstance(mapping, dict) and bool(mapping.get("unsloth_fixed"))


def _is_megatron(file: AdapterFile) -> bool:
    """Its export names the parameters in full and, unlike PEFT, writes no version."""
    targets = map(str, file.config.get("target_parameters") or ())
    return not file.config.get("peft_version") and any(re.search(r"layers\.\d+\.", name) for name in targets)


def _square_is_in_out(file: AdapterFile) -> bool:
    """Where shapes cannot tell: the user's word, else PEFT's version and how the architecture stores experts."""
    if file.expert_layout != "auto":
        return file.expert_layout == "in-out"
    return file.stores_experts_in_out or _peft_version(file) < OUT_IN_SINCE


def _peft_version(file: AdapterFile) -> tuple[int, ...]:
    """(major, minor); (0, 0) for the versions before 0.18, which did not write it."""
    from packaging.version import Version

    try:
        return Version(str(file.config.get("peft_version") or "0").partition("@")[0]).release[:2]
    except ValueError:
        raise file.refuse(
            f"peft_version is {file.config.get('peft_version')!r}",
            expected="a version: it decides how square expert weights are stored",
            next_step="--expert-layout out-in or in-out",
        ) from None
