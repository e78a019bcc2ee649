"""The unmerged component: every module that an adapter file trained does its work beside the base's layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from lora_export.contracts import DiffusionAdapter, Piece, TrainedModule
from lora_export.errors import AdapterError
from lora_export.validation.pipelines.activations import (
    Adapted,
    Added,
    Change,
    Instead,
    Mixed,
    Replaced,
    Scaled,
    Shifted,
    Through,
    axis_of,
    cut,
)
from lora_export.validation.pipelines.loading import Modules
from lora_export.validation.pipelines.probing import squares
from lora_export.validation.pipelines.turning import rotation_of
from lora_export.validation.pipelines.updates import Parts, has_update, low_rank, update_of
from lora_export.validation.reference.files import START
from lora_export.validation.reference.probes import base_layer, wrapped_modules

WEIGHTS = "adapter_model.safetensors"  # of a PEFT folder


@dataclass
class Changes:
    """What adapters change in a component.

    layers: by the path in the model; names: of the base's tensors → (path in the model, parameter); parameters:
    that no module owns, with what is added to them.
    """

    layers: dict[str, Adapted] = field(default_factory=dict)
    names: dict[str, tuple[str, str]] = field(default_factory=dict)
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)

    def active(self, yes: bool) -> None:
        for layer in self.layers.values():
            layer.active = yes


@dataclass(frozen=True)
class Target:
    """A piece of a trained weight, and the layer in the model that holds it."""

    piece: Piece
    path: str
    layer: Adapted

    @property
    def rows(self) -> slice | None:
        return None if self.piece.rows is None else slice(*self.piece.rows)

    @property
    def axis(self) -> int:
        return axis_of(self.layer.base_layer)

    def own(self, values: torch.Tensor) -> torch.Tensor:
        """The rows of a value for each output of the trained weight that are this piece's."""
        return cut(values, self.rows, self.piece.swap, 0)

    def add(self, change: Change) -> None:
        self.layer.changes.append(change)


def inject(model: nn.Module, component: str, adapters: Sequence[DiffusionAdapter]) -> Changes:
    """Put the adapters' work beside the layers of a component of the base, in place."""
    changes, places = Changes(), Modules(model)
    for adapter in adapters:
        if not adapter.modules and not adapter.vectors:
            changes = _through_peft(model, adapter, changes)
            places = Modules(model)
            continue
        modules = [m for m in adapter.modules if m.component == component]
        if not modules:
            continue
        file = adapter.path / WEIGHTS if adapter.path.is_dir() else adapter.path
        with safe_open(file, framework="pt") as tensors:
            for module in modules:
                parts = {part: _read(tensors, key) for part, key in module.keys.items()}
                _apply(places, module, parts, adapter.weight, changes)
    return changes


def _through_peft(model: nn.Module, adapter: DiffusionAdapter, changes: Changes) -> Changes:
    """A kind that PEFT alone defines: its own layers around those of the component that has its modules."""
    import peft

    with safe_open(adapter.path / WEIGHTS, framework="pt") as tensors:
        held = [name.removeprefix(START) for name in tensors.keys() if name.startswith(START)]  # noqa: SIM118
    owners = {name.rpartition(".")[0] for name in held}
    paths = {path for path, _ in model.named_modules() if path}
    if not all(any(owner == p or owner.startswith(f"{p}.") for p in paths) for owner in owners):
        return changes  # of another component
    if changes.layers:
        raise AdapterError(
            "an adapter of a kind that PEFT alone defines, after another one",
            where=adapter.path,
            expected="one such adapter alone, so that PEFT's own model shows what it does",
            next_step="merge the adapters one after another, and validate each result",
        )
    wrapped = peft.PeftModel.from_pretrained(model, str(adapter.path)).eval()
    wrapped.requires_grad_(False)
    places = Modules(model)
    for path, module in wrapped_modules(model).items():
        layer = base_layer(module)
        adapted = Adapted(layer)
        adapted.changes.append(Through(axis_of(layer), module, adapter.weight))
        places.replace(module, adapted)
        changes.layers[path] = adapted
        for name, _ in layer.named_parameters():
            changes.names[f"{path}.{name}"] = (path, name)
    return changes


def _read(tensors: Any, key: str) -> torch.Tensor:
    value: torch.Tensor = tensors.get_tensor(key)
    return value.float() if value.is_floating_point() else value


def _apply(places: Modules, module: TrainedModule, parts: Parts, weight: float, changes: Changes) -> None:
    bare = [p for p in module.pieces if p.bare]
    if bare:
        _add_to_parameters(places.model, bare, parts, weight, changes)
        return
    targets = [_target(places, piece, changes) for piece in module.pieces]
    used = _weights(module, parts, targets, weight)
    used |= _biases(parts, targets, weight)
    left = set(parts) - used - {"alpha", "on_input"}
    if left:
        raise AdapterError(
            f"validation knows no unmerged forward for {', '.join(sorted(left))}",
            tensor=module.keys[min(left)],
            expected="parts of a kind that is merged",
        )


def _target(places: Modules, piece: Piece, changes: Changes) -> Target:
    path, layer = places.find(piece.module)
    if not isinstance(layer, Adapted):
        adapted = Adapted(layer)
        places.replace(layer, adapted)
        changes.layers[path] = layer = adapted
    for name, _ in layer.base_layer.named_parameters():
        changes.names[f"{piece.module}.{name}"] = (path, name)
    return Target(piece, path, layer)


def _weights(module: TrainedModule, parts: Parts, targets: Sequence[Target], weight: float) -> set[str]:
    """What changes the weight; the parts that it used."""
    first = targets[0].layer.base_layer
    if "oft_blocks" in parts:
        for t in targets:
            t.add(rotation_of(parts, module.alpha or 0.0, t.axis, t.rows, t.piece.swap, _outputs(t.layer)))
        return {"oft_blocks", "rescale"}
    if "on_input" in parts:
        on_input = bool(parts["on_input"].flatten()[0])
        factors = 1 + weight * parts["weight"].flatten()
        for t in targets:
            t.add(Scaled(t.axis, factors if on_input else t.own(factors), on_input))
        return {"weight", "on_input"}
    if "a1" in parts:
        _mix(module, parts, targets, weight, first)
        return {"a1", "a2", "b1", "b2"}
    if "set_weight" in parts:
        for t in targets:
            shape = t.layer.base_layer.weight.shape
            value = t.own(parts["set_weight"]).reshape(shape)
            t.add(Replaced(t.axis, t.layer.base_layer, {"weight": value}))
        return {"set_weight"}
    if "w_norm" in parts or "b_norm" in parts:
        given = {n: parts[p] for n, p in (("weight", "w_norm"), ("bias", "b_norm")) if p in parts}
        for t in targets:
            own = {n: t.own(v) for n, v in given.items()}
            t.add(Added(t.axis, Instead(t.layer.base_layer, own, zero=True), weight, None, False))
        return {"w_norm", "b_norm"}
    used = _added(module, parts, targets, weight)
    return used | _decomposed(parts, targets)


def _added(module: TrainedModule, parts: Parts, targets: Sequence[Target], weight: float) -> set[str]:
    """Updates that are added: of factors, or whole."""
    used: set[str] = set()
    if has_update(parts):
        delta, rank = update_of(parts, targets[0].layer.base_layer)
        factor = weight * _scale(module.alpha, rank) * float(parts.get("scalar", torch.ones(1)))
        for t in targets:
            t.add(Added(t.axis, delta, factor, t.rows, t.piece.swap))
        used |= {n for n in parts if n.startswith(("lora_", "hada_", "lokr_"))} | {"scalar"}
    if "diff" in parts:
        for t in targets:
            value = t.own(parts["diff"]).reshape(t.layer.base_layer.weight.shape)
            t.add(Added(t.axis, Instead(t.layer.base_layer, {"weight": value}, zero=True), weight, None, False))
        used.add("diff")
    return used


def _scale(alpha: float | None, rank: int | None) -> float:
    return 1.0 if alpha is None or alpha == 0 or rank is None else alpha / rank


def _decomposed(parts: Parts, targets: Sequence[Target]) -> set[str]:
    """DoRA, over rows or over columns: of the norms of what the layers have in effect before it."""
    name = next((n for n in ("dora_scale", "magnitude") if n in parts), None)
    if name is None:
        return set()
    magnitude = parts[name]
    sums = [squares(t.layer) for t in targets]
    columns = magnitude.dim() > 1 and magnitude.shape[0] == 1 and magnitude.numel() > 1
    for t, (of_rows, _) in zip(targets, sums, strict=True):
        if columns:
            norm = torch.stack([s for _, s in sums]).sum(0).sqrt()
            t.add(Scaled(t.axis, magnitude.flatten().double() / norm, on_input=True))
        else:
            t.add(Scaled(t.axis, t.own(magnitude.flatten().double()) / of_rows.sqrt(), on_input=False))
    return {name}


def _mix(module: TrainedModule, parts: Parts, targets: Sequence[Target], weight: float, first: nn.Module) -> None:
    """GLoRA. In old files a1 and b1 are the wide matrices of their pairs, as lora_down is."""
    a1, a2 = parts["a1"].flatten(1), parts["a2"].flatten(1)
    b1, b2 = parts["b1"], parts["b2"]
    inputs: int = getattr(first, "in_features", 0) or getattr(first, "in_channels", 0)
    old = a1.shape[0] != inputs
    reading, writing = (a1, a2) if old else (a2, a1)
    down, up = (b1, b2) if old else (b2, b1)
    delta = low_rank(down, up, first)
    factor = weight * _scale(module.alpha, reading.shape[0])
    for t in targets:
        t.add(Mixed(Added(t.axis, delta, factor, t.rows, t.piece.swap), reading, writing))


def _biases(parts: Parts, targets: Sequence[Target], weight: float) -> set[str]:
    if "diff_b" not in parts:
        return set()
    for t in targets:
        t.add(Shifted(t.axis, weight * t.own(parts["diff_b"].flatten())))
    return {"diff_b"}


def _add_to_parameters(
    model: nn.Module, pieces: Sequence[Piece], parts: Parts, weight: float, changes: Changes
) -> None:
    """Parameters that no module owns have no activations of their own: the value is added before they are used."""
    known: Mapping[str, torch.Tensor] = dict(model.named_parameters())
    (value,) = (parts[n] for n in parts if n in ("diff_m", "diff"))
    for piece in pieces:
        parameter = known[piece.module]
        added = weight * cut(value, None if piece.rows is None else slice(*piece.rows), piece.swap, 0)
        previous = changes.parameters.get(piece.module, torch.zeros(()))
        changes.parameters[piece.module] = previous + added.reshape(parameter.shape)
        changes.names[piece.module] = ("", piece.module)


def _outputs(layer: Adapted) -> int:
    return int(layer.base_layer.weight.shape[0])
