"""The model that a graph is held against: transformers' class in fp32, with the weights that the graph holds."""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from lora_export.storage.sealed import read_json
from lora_export.validation.comparing import sentence

QUANTIZED = ("int4", "int8", "nf4")
_MAP = "weights-map.json"
_FILE = re.compile(r"(?:model|diffusion_pytorch_model)(?:\.([\w-]+?))?(?:-\d+-of-\d+(?:\.([\w-]+))?)?\.safetensors")


@dataclass(frozen=True)
class Loaded:
    """model: in evaluation mode; words: what it is; wrong: tensors that the graph does not hold as the checkpoint
    has them; streamed: whether its weights are read when they are needed."""

    model: Any
    words: str
    wrong: tuple[str, ...] = ()
    streamed: bool = False


@contextlib.contextmanager
def loaded(request: Mapping[str, Any]) -> Iterator[Loaded]:
    """With the checkpoint's weights; or with those of the graph itself where they are quantized or streamed.

    A model whose weights in fp32 take more than half of the memory that is available is streamed from its files.
    """
    if request["kind"] == "component":
        from lora_export.validation.proof import diffusion

        with diffusion.loaded(request) as component:
            yield component
        return
    folder, export = Path(request["model"]), Path(request["export"])
    graphs = [export / name for name in request["graphs"]]
    own = request["precision"] in QUANTIZED or request["streamed_numbers"]
    if own and (export / _MAP).is_file():
        from lora_export.validation.proof.held_weights import model_of_graphs

        with model_of_graphs(request, graphs) as found:
            yield found
        return
    model, streamed = load(folder, request["architecture"])
    sentence.attach(model, folder)
    words = f"{type(model).__name__} of transformers in fp32, with the checkpoint's weights"
    if request["adapter"]:
        import peft

        model = peft.PeftModel.from_pretrained(model, request["adapter"], local_files_only=True).get_base_model()
        model.eval()
        words += " and PEFT's adapter"
    yield Loaded(model, words + (", streamed from their files" if streamed else ""), streamed=streamed)


def load(folder: Path, architecture: str) -> tuple[Any, bool]:
    """The model in fp32, and whether it is streamed."""
    import transformers

    cls = getattr(transformers, architecture)
    weights = fp32_bytes(folder)
    if weights > psutil.virtual_memory().available // 2:
        from lora_export.validation.reference import streaming

        model, _ = streaming.load_streamed(cls, folder, torch.float32, 0)
        streaming.attach(model, ())
        return model.eval(), True
    variant = variant_of(folder)
    more = {"variant": variant} if variant else {}
    model = cls.from_pretrained(folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, **more)
    return model.eval().requires_grad_(False), False


def variant_of(folder: Path) -> str | None:
    """The variant of the weight files in a folder, where it has no other."""
    names = [m for p in folder.iterdir() if (m := _FILE.fullmatch(p.name))]
    variants = {m[1] or m[2] or "" for m in names}
    return None if "" in variants or not variants else min(variants)


def fp32_bytes(folder: Path) -> int:
    """What the weights of a folder would take in fp32."""
    from safetensors import safe_open

    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as tensors:
            total += sum(4 * math.prod(tensors.get_slice(n).get_shape()) for n in tensors.keys())  # noqa: SIM118
    return total


def arithmetic_of(export: Path, graphs: Sequence[str]) -> str:
    """The narrowest floating-point type of the weights, which the graphs compute in: by their map, or, as of an
    unmerged export, by the graphs."""
    import onnx_ir as ir

    if (export / _MAP).is_file():
        types = {e["dtype"] for e in read_json(export / _MAP)["weights"]}
    else:
        weights = (w for name in graphs for w in ir.load(export / name).graph.initializers.values())
        types = {w.dtype.name.lower() for w in weights if w.dtype is not None}
    return next((t for t in ("bfloat16", "float16") if t in types), "float32")
