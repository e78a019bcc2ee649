"""LoRA (arXiv:2106.09685, eq. 3): W' = W + s·B·A, on linear layers, GPT-2's Conv1D, embeddings, convolutions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lora_export.adapters import attention, experts, stacked
from lora_export.adapters.config import LoraConfig, ensures_tying, parse_lora
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.module import AdaptedModule, modules
from lora_export.adapters.updates import DECOMPOSITION, BiasUpdate, ExactUpdate, LowRank, LowRankUpdate, WholeTarget
from lora_export.contracts import TargetUpdate, Update

if TYPE_CHECKING:
    import torch

NAME = "LoRA"
FORMULA = "W + s·B·A, s = alpha/r or alpha/√r"

LINEAR = ("lora_A", "lora_B")
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
LORA_BIAS = "lora_B.bias"
MAGNITUDE = "lora_magnitude_vector"

LayerType = Literal["linear", "embedding", "convolution"]


@dataclass(frozen=True)
class ResidualUpdate(ExactUpdate):
    """The adapter on the base that its initialisation changed: W − s·B₀·A₀ + s·B·A.

    PiSSA (arXiv:2404.02948, eq. 2-4): s·B₀·A₀ is the part of W in its r largest singular values; OLoRA
    (arXiv:2406.01775, eq. 3): s times the first r columns of Q times the first r rows of R. Both are computed
    from W again, as it is stored: the singular directions of its transpose are the same.
    """

    low_rank: LowRank
    rank: int
    method: str

    def changed(self, weight: "torch.Tensor") -> "torch.Tensor":
        import torch

        low = self.low_rank.double()
        if self.method == "pissa":
            u, sizes, v = torch.linalg.svd(weight, full_matrices=False)
            taken = (u[:, : self.rank] * sizes[: self.rank]) @ v[: self.rank]
        else:
            q, r = torch.linalg.qr(weight)
            taken = low.scaling * (q[:, : self.rank] @ r[: self.rank])
        changed: torch.Tensor = weight - taken + low.scaling * (low.left @ low.right)
        return changed


@dataclass(frozen=True)
class LoraModule(AdaptedModule):
    """A and B of one module, checked by their headers.

    shapes: the weights that they fit, both ways round if either may be stored.
    """

    config: LoraConfig
    layer_type: LayerType
    rank: int
    shapes: tuple[tuple[int, ...], ...]

    @property
    def scaling(self) -> float:
        return self.file.weight * self.config.scaling(self.name, self.rank)

    def is_transposed(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of this shape is stored (in, out): GPT-2's Conv1D, and every embedding's B·A."""
        if self.layer_type == "embedding":
            return True
        # A square weight fits both ways; then only the architecture knows (GPT-2's attention projection).
        return self.layer_type == "linear" and self.is_flipped(shape, *self.shapes[0])

    def load(self, shape: tuple[int, ...]) -> LowRank:
        down, up = (self.read(marker).flatten(1) for marker in self.keys)
        return LowRankUpdate.of(up, down, self.scaling, self.is_transposed(shape)).low_rank


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each LoRA module without a DoRA magnitude, and for each lora_bias."""
    config = parse_lora(file.config, file.where)
    magnitudes = {module.name for module in modules(file, MAGNITUDE)}
    updates = [_update(module) for module in lora_modules(file, config) if module.name not in magnitudes]
    biases = (m for m in modules(file, *LINEAR, LORA_BIAS) if LORA_BIAS in m.keys and m.name not in magnitudes)
    return updates + [_bias(module, config) for module in biases]


def lora_modules(file: AdapterFile, config: LoraConfig) -> list[LoraModule]:
    """Every module with A and B, whatever is done with them; half a pair is refused."""
    checked = []
    for markers in (LINEAR, EMBEDDING):
        pairs = modules(file, *markers)
        names = {module.name for module in pairs}
        for module in pairs:
            other = experts.claims(file, module.name) or stacked.claims(module)
            if not other and not attention.claims(module.name, names):
                module.need(*markers)
                checked.append(_checked(module, config))
    return checked


def factors(file: AdapterFile, target: str) -> LowRank:
    """A and B of the module that has this weight, whatever is done with them; laid out as (outputs, inputs)."""
    config = parse_lora(file.config, file.where)
    module = next(m for m in lora_modules(file, config) if m.weight == target)
    return module.load(module.shapes[0])


def _checked(module: AdaptedModule, config: LoraConfig) -> LoraModule:
    a, b = (module.shape(marker) for marker in module.keys)
    embedding = EMBEDDING[0] in module.keys
    if len(a) != len(b) or len(a) < 2 or (embedding and len(a) != 2):
        raise module.file.refuse(
            f"A has the shape {list(a)}, B {list(b)}",
            tensor=module.name,
            expected="two matrices, or the two kernels of a convolution",
            next_step="if training was sharded (ZeRO-3, FSDP), gather the parameters before saving",
        )
    rank = a[0]
    if len(a) > 2 and b[1] < rank and rank % b[1] == 0:
        raise module.file.refuse(
            f"A {list(a)} and B {list(b)}: LoRA on a convolution in groups mixes the channels of all groups, "
            "and no weight in groups equals that",
            tensor=module.name,
            expected="a convolution without groups",
            next_step="serve it unmerged with PEFT, or train with exclude_modules for this layer",
        )
    if b[1] != rank or any(n != 1 for n in b[2:]):
        raise module.file.refuse(
            f"A {list(a)} and B {list(b)} disagree about the rank",
            tensor=module.name,
            expected="A of shape (r, in) and B of shape (out, r)",
        )
    layer_type: LayerType = "embedding" if embedding else "convolution" if len(a) > 2 else "linear"
    shapes = {
        "embedding": ((a[1], b[0]),), "convolution": ((b[0], *a[1:]),), "linear": ((b[0], a[1]), (a[1], b[0])),
    }  # fmt: skip
    return LoraModule(module.file, module.name, module.keys, config, layer_type, rank, shapes[layer_type])


def _update(module: LoraModule) -> TargetUpdate:
    _ = module.scaling  # refuses a rank that the configuration does not give
    file, linear = module.file, module.layer_type == "linear"
    tied = file.tied or ensures_tying(file.config, "target_modules")
    kind = "lora" if linear else f"lora_{module.layer_type}"
    if linear and module.config.residual:
        file.refuse_weight(f"an adapter initialised with {module.config.residual}")
        load = _loads_residual(module, module.config.residual)
        return WholeTarget(module.weight, kind, module.used, module.shapes, load, tied=tied, copies=DECOMPOSITION)

    def load_plain(shape: tuple[int, ...]) -> LowRankUpdate:
        return LowRankUpdate(module.load(shape))

    return TargetUpdate(
        module.weight, kind, module.used, module.shapes, load_plain, tied=tied, adds=True, low_rank=True
    )


def _loads_residual(module: LoraModule, method: str) -> Callable[[tuple[int, ...]], Update]:
    def load(shape: tuple[int, ...]) -> ResidualUpdate:
        if method == "olora" and module.is_transposed(shape):
            raise module.file.refuse(
                "OLoRA on a Conv1D layer: PEFT decomposes its transposed weight, and cannot run the result",
                tensor=module.name,
                expected="OLoRA on linear layers",
            )
        return ResidualUpdate(module.load(shape), module.rank, method)

    return load


def _bias(module: AdaptedModule, config: LoraConfig) -> TargetUpdate:
    key = module.keys[LORA_BIAS]
    if "lora_B" not in module.keys:
        problem = "a trained bias of lora_B without lora_B"
        raise module.file.refuse(problem, tensor=key, expected="lora_A and lora_B")
    scaling = module.file.weight * config.scaling(module.name, module.shape("lora_B")[1])

    def load(shape: tuple[int, ...]) -> BiasUpdate:
        return BiasUpdate(module.read(LORA_BIAS), scaling)

    return TargetUpdate(module.bias, "lora_bias", (key,), (module.shape(LORA_BIAS),), load, adds=True)
