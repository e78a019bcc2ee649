"""An adapter folder as PEFT reads it: LoRA pairs whose scaling is 1, and tensors that go along as they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from lora_export.checkpoint.adapter_files import CONFIG, WEIGHTS
from lora_export.deltas.spectrum import Spectrum
from lora_export.errors import AdapterError, InputError
from lora_export.storage import documents
from lora_export.storage.disk import check_space
from lora_export.storage.files import output_folder
from lora_export.storage.sealed import write_json
from lora_export.version import __version__

_PREFIX = "base_model.model."  # PEFT's, before every name of the model
# Of the adapter that another is made of, what is still true of it.
_KEPT = (
    "base_model_name_or_path", "revision", "task_type", "bias", "modules_to_save", "use_dora", "lora_bias",
    "trainable_token_indices", "ensure_weight_tying", "peft_version", "auto_mapping",
)  # fmt: skip

DType = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Rank:
    """How far a delta is cut: to a rank, or to the least rank that keeps a share of ‖Δ‖² (neither: not at all)."""

    rank: int | None = None
    energy: float | None = None

    def of(self, spectrum: Spectrum) -> int:
        most = len(spectrum.sizes)
        if self.energy is not None:
            return spectrum.rank_for(self.energy)
        return min(most, self.rank or most)

    @property
    def asked(self) -> bool:
        return self.rank is not None or self.energy is not None


def check_rank(wanted: Rank, needed: bool) -> None:
    """InputError for two answers to one question, or for none where one is needed."""
    if wanted.rank is not None and wanted.energy is not None:
        raise InputError("--rank together with --energy", expected="one of them: each decides the rank")
    if needed and not wanted.asked:
        raise InputError(
            "neither --rank nor --energy", expected="the rank of the new adapter", next_step="--energy 95%"
        )


@dataclass(frozen=True)
class Pair:
    """LoRA on one module: B·A is its delta. a: (r, inputs), b: (outputs, r); of an embedding B·A is transposed.

    norm, lost: ‖Δ‖ and ‖Δ − B·A‖, of the delta that it stands for.
    """

    module: str
    a: torch.Tensor
    b: torch.Tensor
    embedding: bool
    norm: float
    lost: float

    @property
    def rank(self) -> int:
        return len(self.a)


@dataclass(frozen=True)
class ModuleError:
    """error: ‖Δ − BA‖/‖Δ‖ of one module."""

    module: str
    error: float


@dataclass(frozen=True)
class Derived:
    """ranks: module → rank; error: ‖Δ − BA‖/‖Δ‖ over all modules; energy_kept: the share of ‖Δ‖² that is left;
    worst: the modules with the largest error; whole: tensors that the adapter holds unchanged; dropped: changed
    weights that it leaves out."""

    output: Path
    ranks: Mapping[str, int]
    parameters: int
    bytes: int
    error: float
    energy_kept: float
    worst: tuple[ModuleError, ...]
    whole: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    def as_json(self) -> Any:
        return documents.as_json(self)


@dataclass
class NewAdapter:
    """What is to be written. like: the configuration of the adapter that it is made of, if there is one."""

    made_by: str
    like: Mapping[str, Any] = field(default_factory=dict)
    pairs: list[Pair] = field(default_factory=list)
    whole: dict[str, torch.Tensor] = field(default_factory=dict)  # by the model's names, in their own types
    changes: dict[str, Any] = field(default_factory=dict)  # of the configuration
    dropped: list[str] = field(default_factory=list)

    @property
    def prefix(self) -> str:
        """Before every name of the model."""
        return _PREFIX

    @property
    def file(self) -> str:
        return WEIGHTS

    def add(self, module: str, spectrum: Spectrum, rank: int, embedding: bool = False) -> None:
        """The delta (outputs, inputs), of an embedding (rows, width), by its `rank` largest singular values."""
        left, right = spectrum.factors(rank)
        a, b = (left.T, right.T) if embedding else (right, left)
        self.pairs.append(Pair(module, a, b, embedding, spectrum.norm, spectrum.lost(rank)))

    def write(self, output: Path, dtype: DType, force: bool, inputs: Sequence[Path]) -> Derived:
        """All or nothing. AdapterError if there is nothing to write."""
        from safetensors.torch import save_file

        pairs = [p for p in self.pairs if p.rank]
        if not pairs and not self.whole:
            raise AdapterError("nothing is left of the change: every delta is zero", expected="a trained adapter")
        values = {}
        for pair in pairs:
            for name, value in self.named(pair).items():
                rounded = value.to(getattr(torch, dtype)).contiguous()
                if not bool(torch.isfinite(rounded).all()):
                    raise AdapterError(
                        f"a factor is beyond the range of {dtype}",
                        tensor=pair.module,
                        expected="finite numbers",
                        next_step="--dtype float32",
                    )
                values[f"{self.prefix}{name}"] = rounded
        values |= {f"{self.prefix}{name}": value for name, value in self.whole.items()}
        check_space(output.absolute().parent, sum(v.nbytes for v in values.values()))
        with output_folder(output, force, inputs=inputs) as stage:
            save_file(values, stage / self.file, self.metadata(pairs))
            self.write_beside(stage, pairs)
        return self._derived(output, pairs, sum(v.numel() for v in values.values()))

    def named(self, pair: Pair) -> Mapping[str, torch.Tensor]:
        """Its factors by the names of the file, without the prefix."""
        names = ("lora_embedding_A", "lora_embedding_B") if pair.embedding else ("lora_A.weight", "lora_B.weight")
        return {f"{pair.module}.{name}": value for name, value in zip(names, (pair.a, pair.b), strict=True)}

    def metadata(self, pairs: Sequence[Pair]) -> dict[str, str]:
        """Of the file's header."""
        return {"format": "pt", "made_by": f"lora-export {__version__} {self.made_by}"}

    def write_beside(self, stage: Path, pairs: Sequence[Pair]) -> None:
        """The configuration."""
        write_json(stage / CONFIG, self._config(pairs))

    def _config(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        ranks = {p.module: p.rank for p in pairs}
        most = max(ranks.values(), default=1)
        differing = {module: rank for module, rank in ranks.items() if rank != most}
        kept = {key: self.like[key] for key in _KEPT if self.like.get(key) is not None}
        return {
            **kept,
            "peft_type": "LORA",
            "inference_mode": True,
            "r": most,
            "lora_alpha": most,
            "use_rslora": False,
            "rank_pattern": differing,
            "alpha_pattern": differing,
            "target_modules": sorted(ranks),
            "lora_dropout": 0.0,
            "fan_in_fan_out": bool(self.like.get("fan_in_fan_out")),
            "init_lora_weights": True,
            **self.changes,
        }

    def _derived(self, output: Path, pairs: Sequence[Pair], parameters: int) -> Derived:
        total, lost = sum(p.norm**2 for p in self.pairs), sum(p.lost**2 for p in self.pairs)
        errors = [ModuleError(p.module, p.lost / p.norm) for p in self.pairs if p.norm > 0]
        error = (lost / total) ** 0.5 if total > 0 else 0.0
        return Derived(
            output=output,
            ranks={p.module: p.rank for p in pairs},
            parameters=parameters,
            bytes=(output / self.file).stat().st_size,
            error=error,
            energy_kept=1 - error**2,
            worst=tuple(sorted(errors, key=lambda e: -e.error)[:5]),
            whole=tuple(sorted(self.whole)),
            dropped=tuple(self.dropped),
        )
