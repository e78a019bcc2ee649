"""Faults as merging tools make them, put into the weights of an honest merge, and a bench that judges in memory.

`tools/sensitivity.py` tries the same list on a real model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from lora_export.contracts import AdapterChoice, Check, Deviation, MergeOptions
from lora_export.progress import Silent
from lora_export.validation.comparing.decoder import DecoderComparison
from lora_export.validation.comparing.deviation import first_deviation
from lora_export.validation.comparing.tensors import compare_tensors, verdict
from lora_export.validation.comparing.texts import tokenize
from lora_export.validation.comparing.thresholds import FACTOR
from lora_export.validation.reference import loading
from lora_export.validation.reference import unmerged as reference
from lora_export.validation.reference.probes import base_layer, wrapped_modules

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Changed = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Material:
    """A Llama, merged: its weights and the base's by name, fp32; `updated`: those with an adapter, in order."""

    merged: Mapping[str, torch.Tensor]
    base: Mapping[str, torch.Tensor]
    updated: tuple[str, ...]
    layers: int
    head_dim: int
    generator: torch.Generator

    def one(self, names: Sequence[str]) -> str:
        return names[self.number(len(names))]

    def number(self, below: int) -> int:
        return int(torch.randint(below, (1,), generator=self.generator))

    def matrices(self) -> list[str]:
        return [name for name in self.merged if name.endswith("_proj.weight")]

    def in_layer(self, layer: int) -> list[str]:
        return [name for name in self.updated if f".layers.{layer}." in name]


Fault = Callable[[Material], Changed]


def scaled_down(m: Material) -> Changed:
    name = m.one(m.updated)
    return {name: m.merged[name] * 0.99}


def scaled_up(m: Material) -> Changed:
    name = m.one(m.matrices())
    return {name: m.merged[name] * 1.01}


def heads_swapped(m: Material) -> Changed:
    name = f"model.layers.{m.number(m.layers)}.self_attn.q_proj.weight"
    heads = m.merged[name].unflatten(0, (-1, m.head_dim)).clone()
    first = m.number(len(heads) - 1)
    heads[[first, first + 1]] = heads[[first + 1, first]]
    return {name: heads.flatten(0, 1)}


def layer_left_out(m: Material) -> Changed:
    return {name: m.base[name] for name in m.in_layer(m.number(m.layers))}


def keys_and_values_exchanged(m: Material) -> Changed:
    k, v = (f"model.layers.{m.number(m.layers)}.self_attn.{x}_proj.weight" for x in "kv")
    return {k: m.merged[v], v: m.merged[k]}


def noise_row(m: Material) -> Changed:
    name = m.one(m.matrices())
    changed = m.merged[name].clone()
    row = m.number(len(changed))
    changed[row] = torch.randn(changed.shape[1], generator=m.generator) * changed[row].std()
    return {name: changed}


def wrong_alpha(m: Material) -> Changed:
    """alpha/√r for alpha/r, say: every update twice as large, or half."""
    factor = 2.0 if m.number(2) else 0.5
    return {name: m.base[name] + factor * (m.merged[name] - m.base[name]) for name in m.updated}


def embedding_off_by_one(m: Material) -> Changed:
    return {EMBEDDING: m.merged[EMBEDDING].roll(1 if m.number(2) else -1, 0)}


def transposed(m: Material) -> Changed:
    name = f"model.layers.{m.number(m.layers)}.self_attn.o_proj.weight"
    return {name: m.merged[name].T.contiguous()}


def norm_changed(m: Material) -> Changed:
    name = m.one([n for n in m.merged if n.endswith("norm.weight")])
    changed = m.merged[name].clone()
    changed[m.number(len(changed))] *= 1.05
    return {name: changed}


def bit_flipped(m: Material) -> Changed:
    """One bit of one bf16 mantissa, in any matrix; which of the seven is left to chance."""
    name = m.one(m.matrices())
    changed = m.merged[name].to(torch.bfloat16).contiguous()
    element = changed.view(torch.int16).flatten()[m.number(changed.numel()) :][:1]
    element ^= 1 << m.number(7)
    return {name: changed.float()}


def last_layer_left_out(m: Material) -> Changed:
    """The commonest off-by-one in a loop over layers: the last one keeps one of the base's weights."""
    name = m.one(m.in_layer(m.layers - 1))
    return {name: m.base[name]}


def layers_exchanged(m: Material) -> Changed:
    name = m.one([n for n in m.updated if ".layers.0." not in n])
    layer = int(name.split(".")[2])
    other = name.replace(f".layers.{layer}.", f".layers.{layer - 1}.")
    return {name: m.merged[other], other: m.merged[name]}


def column_lost(m: Material) -> Changed:
    name = m.one(m.updated)
    changed = m.merged[name].clone()
    changed[:, m.number(changed.shape[1])] = 0
    return {name: changed}


def update_subtracted(m: Material) -> Changed:
    name = m.one(m.updated)
    return {name: 2 * m.base[name] - m.merged[name]}


FAULTS: tuple[Fault, ...] = (
    scaled_down, scaled_up, heads_swapped, layer_left_out, keys_and_values_exchanged, noise_row, wrong_alpha,
    embedding_off_by_one, transposed, norm_changed, bit_flipped, last_layer_left_out, layers_exchanged, column_lost,
    update_subtracted,
)  # fmt: skip


@dataclass(frozen=True)
class Judgement:
    """failed: names of checks; located: the deviation; by_outputs: that one, if its output is above the floor."""

    failed: tuple[str, ...]
    weight_errors: tuple[str, ...]
    located: Deviation | None
    by_outputs: Deviation | None

    @property
    def by_model_outputs(self) -> bool:
        return any(not name.startswith("tensor_") for name in self.failed)

    def suspect(self) -> str | None:
        """The one tensor that a person would look at first."""
        named = (*(self.located.tensors if self.located else ()), *self.weight_errors)
        return named[0] if named else None


@dataclass
class Bench:
    """A merged folder beside its unmerged model, loaded once; `comparison` has measured its floors."""

    unmerged: Any
    merged: Any
    dtypes: Mapping[str, torch.dtype]
    comparison: DecoderComparison
    rows: int

    @classmethod
    def load(cls, unmerged: Any, merged: Path, prompts: Sequence[str], rows: int = 64) -> "Bench":
        model, dtypes = loading.load_merged(merged)
        tokenizer = transformers.AutoTokenizer.from_pretrained(merged, local_files_only=True)
        tokens = tokenize(tokenizer, prompts, len(model.get_input_embeddings().weight))
        comparison = DecoderComparison(tokens=tokens, tokenizer=tokenizer, dtypes=dtypes, progress=Silent())
        comparison.measure(unmerged)
        return cls(unmerged, model, dtypes, comparison, rows)

    def judge(self, touched: Sequence[str] | None = None) -> Judgement:
        """touched: the tensors that were changed; no other need be compared, for each is judged alone."""
        modules = None if touched is None else {name.rpartition(".")[0] for name in touched}
        names, checks = verdict(compare_tensors(self.unmerged, self.merged, self.dtypes, self.rows, modules))
        failed = _failed([*self.comparison.judge(self.merged).checks, *checks])
        if not failed:
            return Judgement((), (), None, None)
        located = self.locate(names)
        seen = located is not None and located.value > FACTOR * located.floor
        return Judgement(failed, names, located, located if seen else None)

    def locate(self, names: Sequence[str]) -> Deviation | None:
        """The first module at fault, `names` being the tensors known to be wrong."""
        unmerged = self.unmerged
        return first_deviation(unmerged, self.merged, lambda: self.comparison.once(unmerged), self.dtypes, names)

    def material(self, seed: int) -> Material:
        wrapped = wrapped_modules(self.unmerged.base_model.model)
        base = {f"{path}.weight": base_layer(module).weight.data for path, module in wrapped.items()}
        config = self.merged.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        merged = {name: p.data for name, p in self.merged.named_parameters()}
        generator = torch.Generator().manual_seed(seed)
        return Material(merged, base, tuple(base), config.num_hidden_layers, head_dim, generator)

    def try_fault(self, fault: Fault, seed: int) -> tuple[tuple[str, ...], Judgement]:
        """(names of the tensors that it changed, what the gates say); the weights are as before afterwards."""
        with self.spoiled(fault(self.material(seed))) as touched:
            return touched, self.judge(touched)

    @contextmanager
    def spoiled(self, changed: Changed) -> Iterator[tuple[str, ...]]:
        """Inside, the merged weights are these, rounded to their types."""
        parameters = dict(self.merged.named_parameters())
        before = {name: parameters[name].data.clone() for name in changed}
        try:
            for name, value in changed.items():
                parameters[name].data.copy_(value.to(self.dtypes[name]))
            tied = (HEAD,) if EMBEDDING in changed and HEAD not in parameters else ()
            yield (*changed, *tied)
        finally:
            for name, value in before.items():
                parameters[name].data.copy_(value)


def unmerged_model(base: Path, adapter: Path) -> Any:
    return reference.attach_adapters(loading.load_base(base, MergeOptions()), [AdapterChoice(adapter)])


def _failed(checks: Sequence[Check]) -> tuple[str, ...]:
    return tuple(c.name for c in checks if not c.passed)
