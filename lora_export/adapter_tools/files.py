"""Single-file adapters made smaller and combined, without a base: a file of the same names.

Both are for plain LoRA, convolutions included. What has no rank (differences, norms, vectors of textual inversion)
goes along when a file is truncated. The new factors have scaling 1: alpha is the rank, in the tensors or the
metadata, wherever the file had it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lora_export.adapter_tools.combine import as_one
from lora_export.adapter_tools.pipelines import as_stored, scalings
from lora_export.adapter_tools.saving import Derived, DType, NewAdapter, Pair, Rank, check_rank
from lora_export.adapters.diffusion.endings import grouped
from lora_export.adapters.diffusion.metadata import PEFT_JSON
from lora_export.adapters.diffusion.outside import Seen, SeenModule, look_at
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.updates import LowRank, LowRankUpdate
from lora_export.checkpoint.adapter_files import open_single_file
from lora_export.contracts import Adapter, AdapterChoice, MergeOptions, TargetUpdate
from lora_export.deltas import spectrum
from lora_export.errors import AdapterError
from lora_export.merging.planning.combine import check_options

_PLAIN = frozenset({"lora_down", "lora_up", "alpha"})
_BESIDE = frozenset({"diff_b"})  # of a bias, which no rank changes
_CARRIED = frozenset({"full", "bias", "norm", "set", "parameter"})
# Of sd-scripts' metadata: what is not true of another file.
_STALE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
_RANKS = ("ss_network_dim", "ss_network_alpha")


def truncate_file(path: Path, output: Path, wanted: Rank, dtype: DType = "float32", force: bool = False) -> Derived:
    """Write `path` in lower ranks into a new folder. AdapterError for kinds without matrices A and B of a rank."""
    check_rank(wanted, needed=True)
    source = open_lora(path)
    new = NewLoraFile("truncate", {})
    new.take_names(source)
    for module in source.seen.modules:
        keys = source.groups[module.spelling]
        if module.kind in _CARRIED:
            new.whole |= {key: source.file.source.read(key) for key in keys.values()}
            continue
        new.whole |= {keys[part]: source.file.source.read(keys[part]) for part in _BESIDE if part in keys}
        low = source.factors(module).double()
        values = spectrum.of_factors(low.scaling * low.left, low.right)
        new.add(module.spelling, values, wanted.of(values))
    new.whole |= {v.key: source.file.source.read(v.key) for v in source.seen.vectors}
    return new.write(output, dtype, force, [path])


def combine_files(
    adapters: Sequence[AdapterChoice],
    paths: Sequence[Path],
    output: Path,
    options: MergeOptions,
    wanted: Rank,
    dtype: DType = "float32",
    force: bool = False,
) -> Derived:
    """Write one file that does what `options.combine` makes of several. AdapterError for files of different names,
    and for anything in them that is no plain LoRA."""
    check_options(options)
    sources = [open_lora(path) for path in paths]
    formats = {s.seen.format for s in sources}
    if len(formats) > 1:
        raise AdapterError(
            f"the files are spelled in different ways: {', '.join(sorted(formats))}, and only a base tells which "
            "names mean the same weight",
            where=paths[1],
            expected="files of one format",
            next_step="lora-export merge -b PIPELINE -a A -a B --combine …, then extract -b PIPELINE -m MERGED",
        )
    read = [s.adapter(c.weight) for s, c in zip(sources, adapters, strict=True)]
    new = NewLoraFile(f"combine {options.combine}", {})
    for source in reversed(sources):
        new.take_names(source)
    as_one(new, read, options, wanted)
    return new.write(output, dtype, force, list(paths))


@dataclass(frozen=True)
class LoraFile:
    """A file, its metadata, and what was seen in it: spelling → part → tensor."""

    file: AdapterFile
    header: Mapping[str, str]
    seen: Seen
    groups: Mapping[str, Mapping[str, str]]

    def factors(self, module: SeenModule) -> LowRank:
        """B (outputs, r), A (r, inputs · kernel) and scaling. AdapterError for other kinds."""
        keys, scale = self.groups[module.spelling], module.scale
        if not self.is_plain(module) or scale is None:
            raise self._no_factors(module)
        left, right = (self.file.read(keys[part]).flatten(1) for part in ("lora_up", "lora_down"))
        return LowRank(left, right, scale)

    def _no_factors(self, module: SeenModule) -> AdapterError:
        keys = self.groups[module.spelling]
        return self.file.refuse(
            f"{module.spelling} is {module.kind} ({', '.join(sorted(keys))}), not two matrices of one rank",
            tensor=next(iter(keys.values())),
            expected="LoRA: a down and an up matrix, and alpha",
            next_step="lora-export merge -b PIPELINE -a FILE -o MERGED, then extract -b PIPELINE -m MERGED "
            "--rank N -o SMALLER",
        )

    def adapter(self, weight: float) -> Adapter:
        """Its updates by its own spellings; of weights as matrices (outputs, inputs · kernel)."""
        if self.seen.vectors:
            raise self.file.refuse(
                "vectors of textual inversion cannot be combined",
                tensor=self.seen.vectors[0].key,
                expected="LoRA alone",
            )
        updates = tuple(self.update(module) for module in self.seen.modules)
        ranks = [m.rank for m in self.seen.modules if m.rank]
        return Adapter(self.file.folder, "lora", {"r": max(ranks, default=0)}, updates, self.file.tensors, weight)

    def update(self, module: SeenModule, beside: bool = False) -> TargetUpdate:
        """Of the weight of a module that is plain LoRA. AdapterError for others; beside: it may change a bias."""
        if not self.is_plain(module) or (not beside and _BESIDE & self.groups[module.spelling].keys()):
            raise self._no_factors(module)
        keys = self.groups[module.spelling]
        down, up = (self.file.tensors[keys[part]].shape for part in ("lora_down", "lora_up"))
        shape = (up[0], torch.Size(down[1:]).numel())

        def load(_: tuple[int, ...]) -> LowRankUpdate:
            return LowRankUpdate(self.factors(module))

        names = tuple(keys.values())
        return TargetUpdate(f"{module.spelling}.weight", "lora", names, (shape,), load, adds=True, low_rank=True)

    def is_plain(self, module: SeenModule) -> bool:
        """Whether its weight is changed by two matrices and their alpha."""
        return self.groups[module.spelling].keys() <= _PLAIN | _BESIDE and bool(module.scale)


def open_lora(path: Path, *, allow_nonfinite: bool = False) -> LoraFile:
    """A file that is understood without a base. AdapterError for what a merge would refuse."""
    tensors, metadata = open_single_file(path)
    file = AdapterFile(tensors, {}, path, allow_nonfinite=allow_nonfinite)
    seen = look_at(file, metadata)
    vectors = {v.key for v in seen.vectors}
    groups, _ = grouped(file, [n for n in file.tensors if n not in vectors])
    if seen.problems or seen.unknown:
        found = seen.problems[0] if seen.problems else f"{len(seen.unknown)} tensors have endings of no kind"
        raise file.refuse(found, tensor=next(iter(seen.unknown), None), expected="a whole adapter")
    if seen.splits_qkv:
        raise file.refuse(
            "q, k and v were trained apart (split_qkv), and it is not said which alpha is meant",
            expected="a file whose alpha is certain",
            next_step="lora-export merge --split-qkv-alpha …, then extract -b PIPELINE -m MERGED",
        )
    return LoraFile(file, metadata, seen, groups)


@dataclass
class NewLoraFile(NewAdapter):
    """A file of the names of others. forms: spelling → its parts' names, and the shape of its inputs and kernel."""

    name: str = ""
    header: dict[str, str] = field(default_factory=dict)
    forms: dict[str, tuple[Mapping[str, str], tuple[int, ...]]] = field(default_factory=dict)
    says_alpha: bool = False

    def take_names(self, source: LoraFile) -> None:
        """The names of a file; those of a later one win."""
        self.name, self.header = source.file.where.name, dict(source.header)
        for module in source.seen.modules:
            keys = source.groups[module.spelling]
            if "lora_down" in keys:
                self.forms[module.spelling] = (keys, source.file.tensors[keys["lora_down"]].shape[1:])
                self.says_alpha |= "alpha" in keys

    @property
    def prefix(self) -> str:
        return ""

    @property
    def file(self) -> str:
        return self.name

    def named(self, pair: Pair) -> Mapping[str, torch.Tensor]:
        keys, shape = self.forms[pair.module]
        down, up = as_stored(pair, shape)
        alpha = {keys.get("alpha", f"{pair.module}.alpha"): torch.tensor(float(pair.rank))}
        return {keys["lora_down"]: down, keys["lora_up"]: up, **(alpha if self.says_alpha else {})}

    def metadata(self, pairs: Sequence[Pair]) -> dict[str, str]:
        """What is still true of it, and the ranks, as sd-scripts' resizing writes them."""
        kept = {k: v for k, v in self.header.items() if k not in _STALE}
        ranks = {p.rank for p in pairs}
        told = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
        kept |= {key: told for key in _RANKS if key in kept}
        plain = {k for k in kept if k.endswith((".r", ".lora_alpha", ".use_rslora"))}
        if PEFT_JSON in kept or plain:
            kept = {k: v for k, v in kept.items() if k not in plain and k != "alpha"}
            kept[PEFT_JSON] = scalings(pairs)
        kept.pop("alpha", None)
        return {**kept, **super().metadata(pairs)}

    def write_beside(self, stage: Path, pairs: Sequence[Pair]) -> None:
        """Nothing: the file says everything."""
