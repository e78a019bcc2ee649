"""Adapters that PEFT itself cannot load, written as ones that it can: for the reference alone.

From each trainer's own formula, and without a line of merging/ or adapters/. mlx-lm (tuner/lora.py, dora.py):
y = W·x + scale·((x·lora_a)·lora_b); of an embedding W + scale·lora_a·lora_b; DoRA's m is divided by the norms of
the rows. Tinker and SGLang: matrices of experts stacked, and q, k and v of a linear attention apart, where the
model has one weight for them.
"""

import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_export import meta_model as skeleton
from lora_export.contracts import AdapterChoice
from lora_export.errors import AdapterError
from lora_export.validation.reference.files import START, Stored, adapter_config, all_headers, headers
from lora_export.validation.reference.trained import loaded_names

STACK = re.compile(r"(.*experts)\.(?:(\d+)\.)?(w1|w2|w3|gate_proj|up_proj|down_proj|gate_up_proj)")
_HALF = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1}
SPLIT = re.compile(r"(.*)\.in_proj_(q|k|v|z|b|a)")
_INTERLEAVED = "gpt_oss"  # its experts' gate and up alternate


@dataclass(frozen=True)
class Factors:
    """The change b·a of one weight (out, in), before the scale; m: DoRA's magnitude of each row, or None."""

    module: str
    a: torch.Tensor
    b: torch.Tensor
    m: torch.Tensor | None = None


@dataclass
class Block:
    """What of one loaded parameter an adapter changes: pairs of its rows' indices and factors, of each expert."""

    parts: list[tuple[int, torch.Tensor | slice, Factors]] = field(default_factory=list)


class Writer:
    """Factors put to the parameters of the model as transformers loads it, and saved as PEFT's own model saves."""

    def __init__(
        self, base: Path, source: Path, target: Path, factors: list[Factors], scale: float, tied: bool
    ) -> None:
        self.base, self.source, self.target = base, source, target
        self.factors, self.scale, self.tied = factors, scale, tied
        self.model = skeleton.build(base)
        self.modules = dict(self.model.named_modules())  # kept, for PEFT is to wrap them
        self.loaded = {name: loaded[0] for name, loaded in loaded_names(self.model, headers(base)).items()}
        self.shapes = {n: tuple(p.shape) for n, p in self.model.named_parameters(remove_duplicate=False)}
        # A saved head or embedding is compared with PEFT's: the names of the model's own.
        self.ties = dict(getattr(self.model, "all_tied_weights_keys", None) or {})
        self.blocks: dict[str, Block] = defaultdict(Block)

    def write(self) -> None:
        whole = {}
        for factors in self.factors:
            name = self._parameter(factors.module)
            # PEFT's DoRA of an embedding norms its columns, so that here the embedding is written whole.
            if factors.m is not None and isinstance(self._module(name), nn.Embedding):
                whole[name] = self._magnified(factors, name)
            else:
                self._put(factors, name)
        saved = {n.rpartition(".")[0]: v for n, v in self._with_ties(whole).items()}
        rank = max((self._rank(b) for b in self.blocks.values()), default=1)
        parameters = {n for n in self.blocks if not self._is_layer(n)}
        config, paths = self._wrapped(rank, parameters, saved)
        lost = self.blocks.keys() - paths.keys()
        if lost:  # PEFT takes a plain layer of this name for one of the model's experts
            self.model = skeleton.build(self.base)
            config, paths = self._wrapped(rank, parameters | lost, saved)
        tensors = {f"{START}{module}.weight": value for module, value in saved.items()}
        for name, path in paths.items():
            tensors |= {f"{path}.{k}": v for k, v in self._tensors(name, rank).items()}
        narrow = {k: v.float().contiguous() for k, v in tensors.items()}
        save_file(narrow, self.target / "adapter_model.safetensors")
        config.save_pretrained(self.target)

    def _wrapped(self, rank: int, parameters: Set[str], saved: Collection[str]) -> tuple[Any, dict[str, str]]:
        """(PEFT's configuration; parameter that it wraps → path of the wrapper)."""
        dora = any(f.m is not None for f in self.factors)
        if dora and parameters:
            raise AdapterError(
                "PEFT has no DoRA for this weight, so there is no unmerged model to compare with",
                where=self.source,
                tensor=min(parameters),
                expected="DoRA on linear layers and embeddings",
                next_step="lora-export verify MERGED -b BASE -a ADAPTER recomputes the merge",
            )
        modules = [n.rpartition(".")[0] for n in self.blocks if n not in parameters]
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=self.scale * rank,
            target_modules=modules or ["-"],
            target_parameters=sorted(parameters) or None,
            modules_to_save=list(saved) or None,
            use_dora=dora,
            inference_mode=True,
        )
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layout = peft.get_peft_model(self.model, config, low_cpu_mem_usage=True)
        paths = {}
        for path, module in layout.named_modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                owner = path.removeprefix(START).replace(".base_layer", "")
                paths[f"{owner}.{getattr(module, 'parameter_name', 'weight')}"] = path
        return config, paths

    def _tensors(self, name: str, rank: int) -> dict[str, torch.Tensor]:
        """PEFT's own matrices of one parameter."""
        shape, block = self.shapes[name], self.blocks[name]
        if len(shape) == 2:
            a, b = self._pair(block.parts, shape[0], shape[1], rank)
            if isinstance(self._module(name), nn.Embedding):
                return {"lora_embedding_A": b.T, "lora_embedding_B": a.T}
            m = block.parts[0][2].m
            more = {} if m is None else {"lora_magnitude_vector": m}
            return {"lora_A.weight": a, "lora_B.weight": b} | more
        owner = self._module(name)
        out, width = shape[:0:-1] if getattr(owner, "is_transposed", False) else shape[1:]
        pairs = [self._pair([p for p in block.parts if p[0] == e], out, width, rank) for e in range(shape[0])]
        a, b = (torch.stack(x) for x in zip(*pairs, strict=True))
        return {"lora_A.weight": a.flatten(0, 1), "lora_B.weight": b.permute(1, 2, 0).flatten(1)}

    @staticmethod
    def _pair(
        parts: Sequence[tuple[int, Any, Factors]], out: int, width: int, rank: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(a, b) of all parts together: each has ranks of its own, and its rows."""
        a, b, first = torch.zeros(rank, width).double(), torch.zeros(out, rank).double(), 0
        for _, rows, factors in parts:
            last = first + len(factors.a)
            a[first:last] = factors.a
            b[rows, first:last] = factors.b
            first = last
        return a, b

    @staticmethod
    def _rank(block: Block) -> int:
        sizes: dict[int, int] = defaultdict(int)
        for expert, _, factors in block.parts:
            sizes[expert] += len(factors.a)
        return max(sizes.values())

    def _put(self, factors: Factors, name: str) -> None:
        stack, split = STACK.fullmatch(factors.module), SPLIT.fullmatch(factors.module)
        rows: torch.Tensor | slice = slice(None)
        expert = 0
        if len(self.shapes[name]) == 3 and stack:
            expert = int(stack[2])
            rows = self._half(name, stack[3], len(factors.b))
        elif split and not name.endswith(f"in_proj_{split[2]}.weight"):
            rows = self._rows(name, split[2])
        self.blocks[name].parts.append((expert, rows, factors))
        if self.tied and isinstance(self._module(name), nn.Embedding):
            for other in self._tied_to(name):
                self.blocks[other].parts.append((0, slice(None), factors))

    def _half(self, name: str, part: str, height: int) -> torch.Tensor | slice:
        if not name.endswith("gate_up_proj") or part == "gate_up_proj":
            return slice(None)
        if _INTERLEAVED in str(self.model.config.model_type):
            return slice(_HALF[part], None, 2)
        return slice(_HALF[part] * height, (_HALF[part] + 1) * height)

    def _rows(self, name: str, part: str) -> torch.Tensor:
        """Where q, k, v or z lie in the weight of all, as the layer's own forward takes its output apart."""
        layer = self.modules[name.rsplit(".", 2)[0]]
        heads, values = layer.num_k_heads, layer.num_v_heads // layer.num_k_heads
        of_keys, of_values = layer.head_k_dim, values * layer.head_v_dim
        sizes = {"q": of_keys, "k": of_keys, "v": of_values, "z": of_values, "b": values, "a": values}
        whole = name.split(".")[-2].removeprefix("in_proj_")
        groups = 1 if whole == "qkv" else heads  # in the others each head of the keys has all of its own
        first, size = (
            sum(sizes[p] for p in parts) * heads // groups for parts in (whole[: whole.index(part)], part)
        )
        rows = torch.arange(self.shapes[name][0]).view(groups, -1)
        return rows[:, first : first + size].flatten()

    def _parameter(self, module: str) -> str:
        """The loaded parameter that holds this module's weight. AdapterError if there is none."""
        stack, split = STACK.fullmatch(module), SPLIT.fullmatch(module)
        wanted = [f"{module}.weight"]
        if stack:
            part = stack[3]
            other = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj", "gate_proj": "w1", "up_proj": "w3"}
            other |= {"down_proj": "w2"}
            wanted += [f"{stack[1]}.{stack[2]}.{other.get(part)}.weight"]
            wanted += [f"{stack[1]}.{'down_proj' if part in ('down_proj', 'w2') else 'gate_up_proj'}"]
        if split:
            wanted += [f"{split[1]}.in_proj_{w}.weight" for w in ("qkv", "qkvz", "ba") if split[2] in w]
        for name in wanted:
            for tail in (name, name[name.find("layers.") :] if "layers." in name else name):
                held = [n for n in (*self.loaded, *self.shapes) if n == tail or n.endswith(f".{tail}")]
                held = sorted(dict.fromkeys(self.loaded.get(n, n) for n in held), key=lambda n: "vis" in n)
                held = [n for n in held if n in self.shapes]
                if held:
                    return str(held[0])
        raise AdapterError(
            "no weight of the loaded model belongs to this part of the adapter",
            where=self.source,
            tensor=module,
            expected="the base that the adapter was trained on",
        )

    def _module(self, name: str) -> Any:
        return self.modules[name.rpartition(".")[0]]

    def _is_layer(self, name: str) -> bool:
        module = self._module(name)
        return name.endswith(".weight") and isinstance(module, nn.Linear | nn.Embedding | Conv1D)

    def _tied_to(self, name: str) -> list[str]:
        return [n for pair in self.ties.items() if name in pair for n in pair if n != name]

    def _with_ties(self, whole: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: v for name, v in whole.items() for n in (name, *self._tied_to(name))}

    def _magnified(self, factors: Factors, name: str) -> torch.Tensor:
        """The whole embedding in effect: m times the rows of W + scale·b·a, each of length one."""
        stored = next(s for n, s in headers(self.base).items() if self.loaded.get(n, n) == name)
        weight = stored.read().double()
        changed = weight + self.scale * factors.b @ factors.a
        assert factors.m is not None
        unit: torch.Tensor = changed / changed.norm(dim=1, keepdim=True)
        return unit * factors.m[:, None]


Read = tuple[list[Factors], float, bool]  # scale; whether a tied head has its embedding's update


def as_peft(base: Path, adapters: Sequence[AdapterChoice], folder: Path) -> list[AdapterChoice]:
    """The same choices, each that PEFT cannot load replaced by one in `folder` that it can."""
    choices = []
    for i, choice in enumerate(adapters):
        read = _read(choice.folder)
        if read is not None:
            target = folder / f"as-peft-{i}"
            target.mkdir(parents=True)
            Writer(base, choice.folder, target, *read).write()
            choice = AdapterChoice(target, choice.weight)
        choices.append(choice)
    return choices


def _read(folder: Path) -> Read | None:
    """None for an adapter that PEFT loads. AdapterError for one that holds less than its trainer writes."""
    config = adapter_config(folder)
    try:
        return _mlx(folder, config) or _stacked(folder, config)
    except (KeyError, TypeError, ValueError, RuntimeError, ZeroDivisionError, OSError) as error:
        raise AdapterError(
            f"the adapter is incomplete: {error}",
            where=folder,
            expected="both matrices of each module, and the rank and scale of the training",
            next_step="lora-export inspect ADAPTER names the tensor",
        ) from error


def _mlx(folder: Path, config: Mapping[str, Any]) -> Read | None:
    parameters = config.get("lora_parameters")
    if "peft_type" in config or not isinstance(parameters, dict):
        return None
    parts: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, value in load_file(folder / "adapters.safetensors").items():
        module, _, leaf = name.rpartition(".")
        parts[module.replace("switch_mlp", "experts")][leaf] = value.double()
    factors: list[Factors] = []
    for module, held in parts.items():
        a, b, m = held["lora_a"], held["lora_b"], held.get("m")
        if b.dim() == 3:
            factors += [
                Factors(_expert(module, e), x, y)
                for e, (x, y) in enumerate(zip(a.reshape(len(b), -1, a.shape[-1]), b, strict=True))
            ]
        elif module.endswith(("embed_tokens", "wte", "word_embeddings", "embed_in")):
            factors.append(Factors(module, b, a, m))
        else:
            factors.append(Factors(module, a.T, b.T, m))
    return factors, float(parameters["scale"]), True


def _stacked(folder: Path, config: Mapping[str, Any]) -> Read | None:
    """None unless the file holds what PEFT has no layer for."""
    stored = list(all_headers(folder))
    stored = [s for s in stored if s.file.name.startswith("adapter_model")] or [
        s for s in stored if s.file.name.startswith("model")
    ]
    if not any(map(_is_odd, stored)) or not all("lora_A" in s.name or "lora_B" in s.name for s in stored):
        return None
    tensors = {_plain(s.name): s.read().double() for s in stored}
    factors: list[Factors] = []
    for name, a in tensors.items():
        if not name.endswith(".lora_A"):
            continue
        module, b = name.removesuffix(".lora_A"), tensors[name.removesuffix("A") + "B"]
        if a.dim() == 3 and STACK.fullmatch(module):
            count = max(len(a), len(b))
            pairs = zip(a.expand(count, -1, -1), b.expand(count, -1, -1), strict=True)
            factors += [Factors(_expert(module, e), x, y) for e, (x, y) in enumerate(pairs)]
        else:
            factors.append(Factors(module, a, b))
    return factors, config["lora_alpha"] / config["r"], False


def _is_odd(stored: Stored) -> bool:
    name = stored.name
    stack = len(stored.shape) == 3 and STACK.search(name) and "lora_" in name
    return bool(stack) or bool(SPLIT.match(name)) or ".unembed_tokens." in name


def _plain(name: str) -> str:
    name = name.removesuffix(".weight").replace(".default", "")
    while name.startswith(("base_model.model.", "base_model.")):
        name = name.removeprefix("base_model.model." if name.startswith("base_model.model.") else "base_model.")
    return name.replace("model.unembed_tokens.", "lm_head.") if name.startswith("model.unembed") else name


def _expert(module: str, index: int) -> str:
    owner, _, part = module.rpartition(".")
    return f"{owner}.{index}.{part}"
