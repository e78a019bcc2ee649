"""LoRA (arXiv:2106.09685, eq. 3): W' = W + s·B·A, on linear layers, GPT-2's Conv1D, embeddings, convolutions."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lora_export.adapters import attention, experts, stacked
from lora_export.adapters.config import LoraConfig, ensures_tying, parse_lora
from lora_export.adapters.keys import group
from lora_export.adapters.kind import AdapterFile
from lora_export.contracts import TargetUpdate, Update

if TYPE_CHECKING:
    import torch

NAME = "LoRA"
PEFT_TYPES = ("LORA",)
FORMULA = "W + s·B·A, s = alpha/r or alpha/√r"

LINEAR = ("lora_A", "lora_B")
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
LORA_BIAS = "lora_B.bias"
MAGNITUDE = "lora_magnitude_vector"

DECOMPOSITION = 20  # copies in fp32: weight, factors, work space, products, all in float64
Layer = Literal["linear", "embedding", "convolution"]


@dataclass(frozen=True)
class LowRank:
    """The delta scaling · left · right; left is fp32 (rows, r), right is fp32 (r, columns)."""

    left: "torch.Tensor"
    right: "torch.Tensor"
    scaling: float

    def double(self) -> "LowRank":
        return LowRank(self.left.double(), self.right.double(), self.scaling)

    def added_to(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        """The weight's rows changed in place, as a matrix: what follows the first dimension is flat."""
        left = self.left[rows]
        return weight.reshape(len(left), self.right.shape[1]).addmm_(left, self.right, alpha=self.scaling)


@dataclass(frozen=True)
class LowRankUpdate:
    """weight + delta, row by row; a convolution's weight (out, in, kernel…) is taken as (out, rest)."""

    low_rank: LowRank

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        return self.low_rank.added_to(weight, rows).reshape(weight.shape)


def low_rank_of(update: Update) -> LowRank:
    """Of an update whose target says that it is low_rank."""
    assert isinstance(update, LowRankUpdate)
    return update.low_rank


@dataclass(frozen=True)
class ResidualUpdate:
    """The adapter on the base that its initialisation changed: W − s·B₀·A₀ + s·B·A.

    PiSSA (arXiv:2404.02948, eq. 2-4): s·B₀·A₀ is the part of W in its r largest singular values; OLoRA
    (arXiv:2406.01775, eq. 3): s times the first r columns of Q times the first r rows of R. Both are computed
    from W again. They need the whole of W, so this does not go row by row.
    """

    low_rank: LowRank
    rank: int
    method: str

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        import torch

        exact = weight.double()
        if self.method == "pissa":
            u, sizes, v = torch.linalg.svd(exact, full_matrices=False)
            taken = (u[:, : self.rank] * sizes[: self.rank]) @ v[: self.rank]
        else:
            q, r = torch.linalg.qr(exact)
            taken = self.low_rank.scaling * (q[:, : self.rank] @ r[: self.rank])
        delta = self.low_rank.scaling * (self.low_rank.left.double() @ self.low_rank.right.double())
        changed: torch.Tensor = exact - taken + delta
        return changed.to(weight.dtype)

    def terms(self, weight: "torch.Tensor", terms: "torch.Tensor", rows: slice) -> "torch.Tensor":
        """|W| and |W'|: between them all is float64, so nothing else is rounded."""
        return terms + self.apply(weight, rows).abs()


@dataclass(frozen=True)
class BiasUpdate:
    """bias + scaling · addend, for lora_bias; both of shape (out,)."""

    addend: "torch.Tensor"
    scaling: float

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        return weight + self.scaling * self.addend[rows]


@dataclass(frozen=True)
class Module:
    """A and B of one module, checked by their headers.

    shapes: the weights that they fit; flipped: the shape among them that is stored transposed (Conv1D).
    """

    file: AdapterFile
    config: LoraConfig
    name: str
    layer: Layer
    a_key: str
    b_key: str
    rank: int
    shapes: tuple[tuple[int, ...], ...]

    @property
    def scaling(self) -> float:
        return self.file.weight * self.config.scaling(self.name, self.rank)

    def is_transposed(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of this shape is stored (in, out): GPT-2's Conv1D, and every embedding's B·A."""
        if self.layer == "embedding":
            return True
        if self.layer == "convolution":
            return False
        # A square weight fits both ways; then only the architecture knows (GPT-2's attention projection).
        return self.file.is_conv1d(self.name) if self.shapes[0] == self.shapes[1] else shape == self.shapes[1]

    def load(self, shape: tuple[int, ...]) -> LowRank:
        down, up = self.file.read(self.a_key), self.file.read(self.b_key)
        down, up = down.flatten(1), up.flatten(1)
        if self.is_transposed(shape):
            down, up = up.T, down.T
        return LowRank(up, down, self.scaling)


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each LoRA module without a DoRA magnitude, and for each lora_bias."""
    config = parse_lora(file.config, file.where)
    magnitudes = group(file.tensors, (MAGNITUDE,))
    updates = []
    for module in modules(file, config):
        if module.name not in magnitudes:
            updates.append(_update(module))
    for name, keys in group(file.tensors, (*LINEAR, LORA_BIAS)).items():
        if LORA_BIAS in keys and name not in magnitudes:
            updates.append(_bias(file, config, name, keys))
    return updates


def modules(file: AdapterFile, config: LoraConfig) -> list[Module]:
    """Every module with A and B, whatever is done with them; half a pair is refused."""
    found = []
    for markers in (LINEAR, EMBEDDING):
        grouped = group(file.tensors, markers)
        for name, keys in grouped.items():
            other = experts.claims(file, name) or stacked.claims(file, name, keys)
            if not other and not attention.claims(name, grouped):
                found.append(_module(file, config, name, keys, markers))
    return found


def factors(file: AdapterFile, target: str) -> LowRank:
    """A and B of the module that has this weight, whatever is done with them; laid out as (outputs, inputs)."""
    config = parse_lora(file.config, file.where)
    module = next(m for m in modules(file, config) if f"{m.name}.weight" == target)
    return module.load(module.shapes[0])


def _module(
    file: AdapterFile, config: LoraConfig, name: str, keys: dict[str, str], markers: tuple[str, str]
) -> Module:
    missing = [m for m in markers if m not in keys]
    if missing:
        raise file.refuse(
            f"{missing[0]} of this module is missing, {', '.join(keys)} is there",
            tensor=name,
            expected="both " + " and ".join(markers),
            next_step="save the adapter again: model.save_pretrained(DIR)",
        )
    a_key, b_key = (keys[m] for m in markers)
    a, b = file.tensors[a_key].shape, file.tensors[b_key].shape
    if len(a) != len(b) or len(a) < 2 or (markers == EMBEDDING and len(a) != 2):
        raise file.refuse(
            f"A has the shape {list(a)}, B {list(b)}",
            tensor=name,
            expected="two matrices, or the two kernels of a convolution",
            next_step="if training was sharded (ZeRO-3, FSDP), gather the parameters before saving",
        )
    rank = a[0]
    if len(a) > 2 and b[1] < rank and rank % b[1] == 0:
        raise file.refuse(
            f"A {list(a)} and B {list(b)}: LoRA on a convolution in groups mixes the channels of all groups, "
            "and no weight in groups equals that",
            tensor=name,
            expected="a convolution without groups",
            next_step="serve it unmerged with PEFT, or train with exclude_modules for this layer",
        )
    if b[1] != rank or any(n != 1 for n in b[2:]):
        raise file.refuse(
            f"A {list(a)} and B {list(b)} disagree about the rank",
            tensor=name,
            expected="A of shape (r, in) and B of shape (out, r)",
        )
    if markers == EMBEDDING:
        return Module(file, config, name, "embedding", a_key, b_key, rank, ((a[1], b[0]),))
    if len(a) > 2:
        return Module(file, config, name, "convolution", a_key, b_key, rank, ((b[0], *a[1:]),))
    return Module(file, config, name, "linear", a_key, b_key, rank, ((b[0], a[1]), (a[1], b[0])))


def _update(module: Module) -> TargetUpdate:
    _ = module.scaling  # refuses a rank that the configuration does not give
    residual = module.config.residual if module.layer == "linear" else None
    if residual:
        module.file.refuse_weight(f"an adapter initialised with {residual}")

    def load(shape: tuple[int, ...]) -> Update:
        low_rank = module.load(shape)
        if residual == "olora" and module.is_transposed(shape):
            raise module.file.refuse(
                "OLoRA on a Conv1D layer: PEFT decomposes its transposed weight, and cannot run the result",
                tensor=module.name,
                expected="OLoRA on linear layers",
            )
        if residual:
            return ResidualUpdate(low_rank, module.rank, residual)
        return LowRankUpdate(low_rank)

    kind = "lora" if module.layer == "linear" else f"lora_{module.layer}"
    keys = (module.a_key, module.b_key)
    tied = module.file.tied or ensures_tying(module.file.config, "target_modules")
    target = f"{module.name}.weight"
    if residual:

        def whole(_: tuple[int, ...]) -> bool:
            return False

        return TargetUpdate(
            target, kind, keys, module.shapes, load, tied=tied, row_wise=whole, copies=DECOMPOSITION
        )
    return TargetUpdate(target, kind, keys, module.shapes, load, tied=tied, adds=True, low_rank=True)


def _bias(file: AdapterFile, config: LoraConfig, name: str, keys: dict[str, str]) -> TargetUpdate:
    key = keys[LORA_BIAS]
    if "lora_B" not in keys:
        raise file.refuse("a trained bias of lora_B without lora_B", tensor=key, expected="lora_A and lora_B")
    scaling = file.weight * config.scaling(name, file.tensors[keys["lora_B"]].shape[1])

    def load(shape: tuple[int, ...]) -> BiasUpdate:
        return BiasUpdate(file.read(key), scaling)

    return TargetUpdate(f"{name}.bias", "lora_bias", (key,), (file.tensors[key].shape,), load, adds=True)
