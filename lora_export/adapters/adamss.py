"""AdaMSS (PEFT's tuners/adamss): W' = W + P·diag(B₁A₁, …, B_KA_K)·N, and the bias likewise.

N, of the largest r singular directions of (W b), is saved. P is not: it says which outputs belong to which of the K
clusters, found by k-means over the rows of the left singular vectors. PEFT finds them again whenever it loads the
adapter, by a randomized SVD and scikit-learn, both with fixed seeds; so they are found here.
"""

import re
import threading
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_export.adapters.config import Positive
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.module import AdaptedModule, Shapes, modules
from lora_export.adapters.psoft import randomized
from lora_export.adapters.updates import DECOMPOSITION, BiasUpdate, LowRankUpdate, WholeTarget
from lora_export.contracts import TargetUpdate
from lora_export.errors import RuntimeUnavailable

NAME = "AdaMSS"
FORMULA = "W + P·diag(B₁A₁, …)·N, P the clusters of the outputs in the singular directions of (W b)"

_N = "adamss_newB"
_PART = re.compile(r"\.adamss_[AB]\.(\d{1,5})$")
_ITERATIONS, _CLUSTERING_SEED, _MOST_ROUNDS = 2, 123456789, 10


@dataclass(frozen=True)
class Settings:
    """random_seed: of the decomposition, which PEFT writes since 0.21."""

    r: Positive
    num_subspaces: Positive
    random_seed: int | None = None


@dataclass
class Clusters:
    """The outputs of one layer that each of its B is of, computed when they are first asked for."""

    module: AdaptedModule
    count: int
    settings: Settings
    biased: bool
    _outputs: list[torch.Tensor] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self) -> list[torch.Tensor]:
        """int64 positions, a tensor for each B; AdapterError unless they are as many as its rows."""
        with self._lock:
            if self._outputs is None:
                self._outputs = self._find()
            return self._outputs

    def _find(self) -> list[torch.Tensor]:
        base, module = self.module.file.base, self.module
        assert base is not None
        weight = torch.cat(list(base.blocks(module.weight)))
        if self.biased:
            weight = torch.cat([weight, torch.cat(list(base.blocks(module.bias)))[:, None]], dim=1)
        rank = min(self.settings.r, *weight.shape)
        left = randomized(weight, rank, _ITERATIONS, self.settings.random_seed or 0)[0][:, :rank]
        labels = cluster(left, self.count)
        outputs = [torch.where(labels == i)[0] for i in range(int(labels.max()) + 1)]
        sizes, rows = [len(o) for o in outputs], [module.shape(f"adamss_B.{i}")[0] for i in range(self.count)]
        if sizes != rows:
            raise module.file.refuse(
                f"the outputs fall into clusters of {sizes} on this base, the adapter has {rows}",
                tensor=module.name,
                expected="the base that the adapter was trained on: its weights decide the clusters",
            )
        return outputs


def cluster(points: torch.Tensor, count: int) -> torch.Tensor:
    """The cluster of each row of points (n, r), int64 (n,), as PEFT asks scikit-learn for it."""
    means = _k_means()(
        n_clusters=count, init="random", n_init=1, max_iter=_MOST_ROUNDS, random_state=_CLUSTERING_SEED
    )
    return torch.from_numpy(means.fit_predict(points.cpu().numpy())).long()


def _k_means() -> Any:
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise RuntimeUnavailable(
            "AdaMSS puts outputs into clusters by scikit-learn's k-means, which is not installed",
            expected="scikit-learn, as PEFT itself needs it for AdaMSS",
            next_step="pip install scikit-learn",
        ) from error
    return KMeans


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each layer's weight, and one for its bias, if it has one."""
    most = max((int(m[1]) for key in file.tensors if (m := _PART.search(key))), default=-1) + 1
    settings = file.settings(Settings)
    if settings.random_seed is None:
        raise file.refuse(
            "random_seed is None",
            expected="the seed of the decomposition: without it the clusters of the outputs cannot be found again",
        )
    if file.base is not None:
        _k_means()  # refused before anything is written
    markers = (_N, *(f"adamss_{side}.{i}" for side in "AB" for i in range(most)))
    return [u for module in modules(file, *markers) for u in _updates(module, settings)]


def _updates(module: AdaptedModule, settings: Settings) -> list[TargetUpdate]:
    file, count = module.file, sum(m.startswith("adamss_B.") for m in module.keys)
    module.need(_N, *(f"adamss_{side}.{i}" for side in "AB" for i in range(max(1, count))))
    a, b = ([module.shape(f"adamss_{side}.{i}") for i in range(count)] for side in "AB")
    n, rank = module.shape(_N), settings.r
    good = (
        len(n) == 2
        and n[0] <= rank
        and len(module.keys) == 2 * count + 1
        and all(len(x) == len(y) == 2 and x[0] == y[1] and x[1] == n[0] for x, y in zip(a, b, strict=True))
    )
    outputs = sum(y[0] for y in b if y)
    if not good or count != min(settings.num_subspaces, outputs):
        raise module.disagree(
            f"{settings.num_subspaces} pairs A (rᵢ, r) and B (rows, rᵢ), and N (r, in), r at most {rank}"
        )
    biased = file.base is not None and file.base.has(module.bias)
    clusters = Clusters(module, count, settings, biased)

    def load(_: tuple[int, ...]) -> LowRankUpdate:
        left, right = _factors(clusters)
        return LowRankUpdate.of(left, right[:, : n[1] - biased], file.weight)

    def load_bias(_: tuple[int, ...]) -> BiasUpdate:
        left, right = _factors(clusters)
        return BiasUpdate(left @ right[:, -1], file.weight)

    shapes: Shapes = ((outputs, n[1] - biased if file.base is not None else None),)
    # The decomposition is of the whole weight, and so is the memory that it takes.
    weight = WholeTarget(module.weight, "adamss", module.used, shapes, load, copies=DECOMPOSITION, adds=True)
    bias = TargetUpdate(module.bias, "adamss_bias", (), ((outputs,),), load_bias, adds=True)
    return [weight, bias] if biased else [weight]


def _factors(clusters: Clusters) -> tuple[torch.Tensor, torch.Tensor]:
    """(outputs, Σrᵢ) with each Bᵢ in the rows of its cluster, and (Σrᵢ, inputs and bias): Aᵢ·N."""
    module, outputs = clusters.module, clusters.of()
    n = module.read(_N)
    right = torch.cat([module.read(f"adamss_A.{i}") @ n for i in range(clusters.count)])
    left, start = n.new_zeros(sum(len(rows) for rows in outputs), len(right)), 0
    for i, rows in enumerate(outputs):
        b = module.read(f"adamss_B.{i}")
        left[rows, start : start + b.shape[1]] = b
        start += b.shape[1]
    return left, right
