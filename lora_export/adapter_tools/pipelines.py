"""A LoRA out of a fully tuned pipeline: one file in diffusers' naming, of every component that differs.

Linear layers and convolutions become `unet.NAME.lora_A.weight` and `lora_B.weight`, of a convolution (r, in, k…)
and (out, r, 1…). Their ranks differ, and their scaling is 1: the metadata says so as diffusers writes it. Other
weights that differ are differences (`.diff`, `.diff_b`), which diffusers refuses and this tool merges.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_export.adapter_tools.extract import Rest, check_alike, read_float
from lora_export.adapter_tools.saving import Derived, DType, NewAdapter, Pair, Rank, check_rank
from lora_export.adapters.diffusion.metadata import PEFT_JSON
from lora_export.checkpoint.adapter_files import DIFFUSERS
from lora_export.checkpoint.pipeline import open_component, open_pipeline
from lora_export.contracts import MergeOptions, Pipeline, Progress
from lora_export.deltas import spectrum
from lora_export.errors import CheckpointError
from lora_export.merging.planning.plan import MergePlan, plan_merge
from lora_export.progress import Silent

# Modules whose weight is a table, of CLIP and T5: a LoRA of those has other names, which diffusers does not read.
_TABLES = ("token_embedding", "position_embedding", "shared", "embed_tokens", "relative_attention_bias")


def extract_pipeline(
    base: Path,
    tuned: Path,
    output: Path,
    wanted: Rank,
    rest: Rest = "save",
    dtype: DType = "float32",
    force: bool = False,
    progress: Progress | None = None,
) -> Derived:
    """Write `pytorch_lora_weights.safetensors` with what makes `tuned` of `base`, in a new folder.

    rest: what becomes of norms, biases, embeddings and bare parameters that differ: their differences saved,
    left out, or refused. One weight is in memory at a time, in float64. CheckpointError where the two are not of
    one architecture.
    """
    check_rank(wanted, needed=True)
    progress = progress or Silent()
    before, after = open_pipeline(base), open_pipeline(tuned)
    _check_components(before, after)
    new, plans = NewFile("extract"), {}
    for name, component in before.components.items():
        pair = (component, after.components[name])
        one, two = (plan_merge(open_component(c), [], MergeOptions()) for c in pair)
        check_alike(one, two)
        plans[name] = (one, two)
    done, count = 0, sum(len(one.tensors) for one, _ in plans.values())
    for name, (one, two) in plans.items():
        for tensor in one.tensors:
            _Change(name, tensor, one, two, wanted, rest).add_to(new)
            done += 1
            progress.advance(done, count)
    return new.write(output, dtype, force, [base, tuned])


def _check_components(base: Pipeline, tuned: Pipeline) -> None:
    ours = {name: c.class_name for name, c in base.components.items()}
    theirs = {name: c.class_name for name, c in tuned.components.items()}
    if ours == theirs:
        return
    names = [f"{n} ({c})" for n, c in sorted(theirs.items() ^ ours.items())]
    raise CheckpointError(
        f"the two pipelines differ in their components: {', '.join(names)}",
        where=tuned.folder,
        expected=f"the components of {base.folder}",
        next_step="give the pipeline that this one was tuned from",
    )


@dataclass(frozen=True)
class _Change:
    """What became of one tensor of a component."""

    component: str
    tensor: str
    base: MergePlan
    tuned: MergePlan
    wanted: Rank
    rest: Rest

    def add_to(self, new: "NewFile") -> None:
        before, after = (read_float(plan, plan.tensors[self.tensor]) for plan in (self.base, self.tuned))
        if before is None or after is None or bool((before == after).all()):
            return
        module, _, leaf = self.tensor.rpartition(".")
        delta = after - before
        if leaf != "weight" or delta.dim() < 2 or module.rpartition(".")[2] in _TABLES:
            self._add_rest(new, delta)
            return
        values = spectrum.of_matrix(delta.flatten(1))
        new.shapes[f"{self.component}.{module}"] = tuple(delta.shape[1:])
        new.add(f"{self.component}.{module}", values, self.wanted.of(values))

    def _add_rest(self, new: "NewFile", delta: torch.Tensor) -> None:
        if self.rest == "refuse":
            raise CheckpointError(
                "the tuned pipeline differs in a weight that LoRA cannot represent",
                where=self.tuned.base.folder,
                tensor=self.tensor,
                expected="linear layers and convolutions alone",
                next_step="--rest save keeps the differences of such weights beside the LoRA, --rest drop leaves "
                "them out",
            )
        if self.rest == "drop":
            new.dropped.append(f"{self.component}.{self.tensor}")
            return
        module, _, leaf = self.tensor.rpartition(".")
        owner = {"weight": f"{module}.diff", "bias": f"{module}.diff_b"}.get(leaf, f"{self.tensor}.diff")
        new.whole[f"{self.component}.{owner}"] = delta.float().contiguous()


class NewFile(NewAdapter):
    """A single file in diffusers' naming. shapes: module → the shape of its weight without the outputs."""

    def __init__(self, made_by: str) -> None:
        super().__init__(made_by)
        self.shapes: dict[str, tuple[int, ...]] = {}

    @property
    def prefix(self) -> str:
        return ""

    @property
    def file(self) -> str:
        return DIFFUSERS

    def named(self, pair: Pair) -> Mapping[str, torch.Tensor]:
        down, up = as_stored(pair, self.shapes[pair.module])
        return {f"{pair.module}.lora_A.weight": down, f"{pair.module}.lora_B.weight": up}

    def metadata(self, pairs: Sequence[Pair]) -> dict[str, str]:
        return {**super().metadata(pairs), PEFT_JSON: scalings(pairs)}

    def write_beside(self, stage: Path, pairs: Sequence[Pair]) -> None:
        """Nothing: the metadata of the file says everything."""


def as_stored(pair: Pair, shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in, k…) and B (out, r, 1…). shape: of the weight without its outputs."""
    return pair.a.reshape(-1, *shape), pair.b.reshape(*pair.b.shape, *(1,) * (len(shape) - 1))


def scalings(pairs: Sequence[Pair]) -> str:
    """PEFT's configuration of each component as diffusers writes it into a header: scaling 1 at every rank.

    A pattern is met by the end of a name, so longer ones come first.
    """
    settings: dict[str, Any] = {}
    for component in dict.fromkeys(p.module.partition(".")[0] for p in pairs):
        start = f"{component}."
        own = {p.module.removeprefix(start): p.rank for p in pairs if p.module.startswith(start)}
        most = max(own.values())
        longest_first = sorted(own, key=len, reverse=True)
        differing = {m: own[m] for m in longest_first if own[m] != most or _ends_as_another(m, own)}
        told = {
            "r": most,
            "lora_alpha": most,
            "rank_pattern": differing,
            "alpha_pattern": differing,
            "target_modules": sorted(own),
        }
        settings |= {f"{start}{key}": value for key, value in told.items()}
    return json.dumps(settings)


def _ends_as_another(module: str, others: Mapping[str, int]) -> bool:
    """Whether a pattern of another module would meet this one."""
    return any(module.endswith(f".{other}") for other in others)
