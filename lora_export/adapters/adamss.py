"""AdaMSS (PEFT's tuners/adamss): W' = W + P·diag(B₁A₁, …, B_KA_K)·N, and the bias likewise.

N, of the largest r singular directions of (W b), is saved. P is not: it says which outputs belong to which of the K
clusters, found by k-means over the rows of the left singular vectors. PEFT finds them again whenever it loads the
adapter, by a randomized SVD and scikit-learn, both with fixed seeds; so they are found here.
"""

import re
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_export.adapters.config import whole
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.lora import DECOMPOSITION, BiasUpdate, LowRank, LowRankUpdate
from lora_export.adapters.parts import Layered, layered
from lora_export.adapters.psoft import randomized
from lora_export.contracts import TargetUpdate
from lora_export.errors import RuntimeUnavailable
from lora_export.storage.documents import is_kind

if TYPE_CHECKING:
    import torch

NAME = "AdaMSS"
PEFT_TYPES = ("ADAMSS",)
FORMULA = "W + P·diag(B₁A₁, …)·N, P the clusters of the outputs in the singular directions of (W b)"

_N = "adamss_newB"
_PART = re.compile(r"\.adamss_[AB]\.(\d{1,5})$")
_ITERATIONS, _CLUSTERING_SEED, _MOST_ROUNDS = 2, 123456789, 10


@dataclass
class Clusters:
    """The outputs of one layer that each of its B is of, found when they are first asked for."""

    layer: Layered
    count: int
    rank: int
    seed: int
    biased: bool
    _found: "list[torch.Tensor] | None" = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self) -> "list[torch.Tensor]":
        """int64 positions, a tensor for each B; AdapterError unless they are as many as its rows."""
        with self._lock:
            if self._found is None:
                self._found = self._find()
            return self._found

    def _find(self) -> "list[torch.Tensor]":
        import torch

        base, name = self.layer.file.base, self.layer.name
        assert base is not None
        weight = torch.cat(list(base.blocks(f"{name}.weight")))
        if self.biased:
            weight = torch.cat([weight, torch.cat(list(base.blocks(f"{name}.bias")))[:, None]], dim=1)
        rank = min(self.rank, *weight.shape)
        labels = cluster(randomized(weight, rank, _ITERATIONS, self.seed)[0][:, :rank], self.count)
        found = [torch.where(labels == i)[0] for i in range(int(labels.max()) + 1)]
        rows = [self.layer.shape(f"adamss_B.{i}")[0] for i in range(self.count)]
        if [len(f) for f in found] != rows:
            raise self.layer.file.refuse(
                f"the outputs fall into clusters of {[len(f) for f in found]} on this base, the adapter has {rows}",
                tensor=name,
                expected="the base that the adapter was trained on: its weights decide the clusters",
            )
        return found


def cluster(points: "torch.Tensor", count: int) -> "torch.Tensor":
    """The cluster of each row of points (n, r), int64 (n,), as PEFT asks scikit-learn for it."""
    import torch

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
    found = layered(file, [_N, *(f"adamss_{side}.{i}" for side in "AB" for i in range(most))])
    if not found:
        return []
    rank, subspaces = whole(file.config, "r", file.where), whole(file.config, "num_subspaces", file.where)
    seed = file.config.get("random_seed")
    if not is_kind(seed, int):
        raise file.refuse(
            f"random_seed is {seed!r}",
            expected="the seed of the decomposition, which PEFT writes since 0.21: without it the clusters of the "
            "outputs cannot be found again",
        )
    if file.base is not None:
        _k_means()  # refused before anything is written
    return [u for layer in found for u in _updates(layer, rank, subspaces, int(seed or 0))]


def _updates(layer: Layered, rank: int, subspaces: int, seed: int) -> list[TargetUpdate]:
    file, count = layer.file, sum(m.startswith("adamss_B.") for m in layer.keys)
    layer.need(_N, *(f"adamss_{side}.{i}" for side in "AB" for i in range(max(1, count))))
    a, b = ([layer.shape(f"adamss_{side}.{i}") for i in range(count)] for side in "AB")
    n = layer.shape(_N)
    good = (
        len(n) == 2
        and n[0] <= rank
        and len(layer.keys) == 2 * count + 1
        and all(len(x) == len(y) == 2 and x[0] == y[1] and x[1] == n[0] for x, y in zip(a, b, strict=True))
    )
    outputs = sum(y[0] for y in b if y)
    if not good or count != min(subspaces, outputs):
        raise layer.disagree(
            *layer.keys, expected=f"{subspaces} pairs A (rᵢ, r) and B (rows, rᵢ), and N (r, in), r at most {rank}"
        )
    biased = file.base is not None and file.base.has(f"{layer.name}.bias")
    clusters = Clusters(layer, count, rank, seed, biased)

    def load(_: tuple[int, ...]) -> LowRankUpdate:
        left, right = _factors(clusters)
        return LowRankUpdate(LowRank(left, right[:, : n[1] - biased], file.weight))

    def load_bias(_: tuple[int, ...]) -> BiasUpdate:
        left, right = _factors(clusters)
        return BiasUpdate(left @ right[:, -1], file.weight)

    shape = (outputs, n[1] - biased if file.base is not None else None)
    whole_weight = TargetUpdate(
        f"{layer.name}.weight",
        "adamss",
        layer.used,
        (shape,),
        load,
        row_wise=_all_rows,
        copies=DECOMPOSITION,
        adds=True,
    )
    if not biased:
        return [whole_weight]
    return [
        whole_weight,
        TargetUpdate(f"{layer.name}.bias", "adamss_bias", (), ((outputs,),), load_bias, adds=True),
    ]


def _all_rows(_: Any) -> bool:
    """The decomposition is of the whole weight, and so is the memory that it takes."""
    return False


def _factors(clusters: Clusters) -> tuple["torch.Tensor", "torch.Tensor"]:
    """(outputs, Σrᵢ) with each Bᵢ in the rows of its cluster, and (Σrᵢ, inputs and bias): Aᵢ·N."""
    import torch

    layer, found = clusters.layer, clusters.of()
    n = layer.read(_N)
    right = torch.cat([layer.read(f"adamss_A.{i}") @ n for i in range(clusters.count)])
    left, start = n.new_zeros(sum(len(rows) for rows in found), len(right)), 0
    for i, rows in enumerate(found):
        b = layer.read(f"adamss_B.{i}")
        left[rows, start : start + b.shape[1]] = b
        start += b.shape[1]
    return left, right
