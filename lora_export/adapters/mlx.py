"""LoRA and DoRA as mlx-lm saves them (mlx_lm/tuner/lora.py, dora.py, utils.py), read as PEFT's own.

A linear layer has lora_a (in, r) and lora_b (r, out), of which ΔW = scale·(lora_a·lora_b)ᵀ; an embedding lora_a
(rows, r) and lora_b (r, width), ΔW = scale·lora_a·lora_b; stacked experts lora_a (experts, r, in) and lora_b
(experts, out, r). DoRA's m has one value for each row of the weight, of an embedding, too.
"""

import re
from dataclasses import dataclass, replace

from lora_export.adapters.config import LARGEST, Number, Positive, settings
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.saved import EMBEDDING_NAMES
from lora_export.adapters.spelling import Respelled
from lora_export.contracts import TensorInfo, TensorSource

NAME = "mlx-lm"

_HEADS = frozenset({"lm_head", "embed_out"})
_LEAF = re.compile(r"(?P<module>.+)\.(?P<leaf>lora_a|lora_b|m)")
_OURS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector.weight"}
_FULL = "mlx_lm.fuse --model BASE --adapter-path DIR --save-path MERGED, then `lora-export export -m MERGED`"


@dataclass(frozen=True)
class Turned(TensorSource):
    """The transpose of a matrix of the file."""

    stored: TensorInfo

    def read_into(self, info: TensorInfo, start: int, into: memoryview) -> None:
        import torch

        turned = self.stored.rows(0, self.stored.height).T.contiguous().reshape(-1).view(torch.uint8)
        into[:] = memoryview(turned.numpy().data)[start : start + len(into)]


@dataclass(frozen=True)
class Parameters:
    """lora_parameters of adapter_config.json. Up to 0.19, mlx-lm multiplied the scale by alpha / rank; later ones
    ignore alpha."""

    rank: Positive
    scale: Number
    alpha: Number | None = None


def claims(file: AdapterFile) -> bool:
    """Whether the configuration is mlx-lm's: PEFT's knows neither word."""
    return "peft_type" not in file.config and bool({"fine_tune_type", "lora_parameters"} & file.config.keys())


def as_peft(file: AdapterFile) -> AdapterFile:
    """The same adapter in PEFT's names, shapes and words. AdapterError for what mlx-lm itself would not load."""
    how = file.config.get("fine_tune_type", "lora")
    if how not in ("lora", "dora"):
        raise file.refuse(
            f"fine_tune_type is {how!r}: this file holds full weights, not an adapter",
            expected="fine_tune_type lora or dora",
            next_step=_FULL,
        )
    parameters = _parameters(file)
    rank, scale = parameters.rank, parameters.scale
    parts = [_part(file, key) for key in file.tensors]
    experts = {module for key, module, _ in parts if len(file.tensors[key].shape) == 3}
    tensors = dict[str, TensorInfo]()
    for key, module, leaf in parts:
        embedding = module.rpartition(".")[2] in EMBEDDING_NAMES - _HEADS
        # An embedding's A·B is a weight (rows, width) as it is: that of a linear layer with the parts exchanged.
        role = {"lora_a": "lora_b", "lora_b": "lora_a"}.get(leaf, leaf) if embedding else leaf
        ours = f"{_plain(module)}.{_OURS[role]}"
        info = file.tensors[key]
        if module in experts and leaf != "m":
            info = replace(info, shape=_of_experts(file, key, leaf, rank))
        elif leaf != "m":
            shape = file.shape(key, 2)
            info = info if embedding else replace(info, shape=shape[::-1], source=Turned(info))
        tensors[ours] = info
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": scale * rank,
        "use_dora": how == "dora",
        "base_model_name_or_path": file.config.get("model"),
    }
    # A tied head is the embedding itself there (as_linear), its update included.
    return replace(file, source=Respelled(tensors), config=config, tied=True)


def _parameters(file: AdapterFile) -> Parameters:
    given = file.config.get("lora_parameters")
    if not isinstance(given, dict):
        raise file.refuse(f"lora_parameters is {given!r}", expected="an object with rank and scale")
    parameters = settings(given, Parameters, file.where)
    rank, scale, alpha = int(parameters.rank), parameters.scale, parameters.alpha
    if abs(scale) * rank > LARGEST:
        raise file.refuse(f"lora_parameters gives the scale {scale!r}", expected=f"at most {LARGEST:g} / rank")
    if alpha is not None and float(alpha) != rank:
        raise file.refuse(
            f"lora_parameters gives both scale {scale:g} and alpha {alpha:g}: old versions of mlx-lm multiplied by "
            "scale · alpha / rank, later ones by scale alone",
            expected="scale without alpha",
            next_step="remove alpha from adapter_config.json, and set scale to the factor of the training",
        )
    return parameters


def _part(file: AdapterFile, key: str) -> tuple[str, str, str]:
    """(key, module, leaf) of a tensor's name."""
    match = _LEAF.fullmatch(key)
    if match is None:
        raise file.refuse(
            "a tensor that is not part of mlx-lm's LoRA or DoRA",
            tensor=key,
            expected="names ending with lora_a, lora_b or m",
            next_step=_FULL,
        )
    return key, match["module"], match["leaf"]


def _plain(module: str) -> str:
    """mlx-lm calls a layer's stacked experts switch_mlp where checkpoints have experts."""
    return ".".join("experts" if part == "switch_mlp" else part for part in module.split("."))


def _of_experts(file: AdapterFile, key: str, leaf: str, rank: int) -> tuple[int, ...]:
    """Some versions saved lora_a of experts with the first two dimensions as one."""
    shape = file.tensors[key].shape
    if leaf == "lora_a" and len(shape) == 2 and shape[0] % rank == 0:
        return (shape[0] // rank, rank, shape[1])
    return file.shape(key, 3)
