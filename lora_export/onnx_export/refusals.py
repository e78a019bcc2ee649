"""What an export refuses, before any work or before anything is left: models, options, patterns."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from lora_export.allowed import check_adapter_folder, check_model_folder
from lora_export.choices import Precision
from lora_export.contracts import QuantizationOptions
from lora_export.errors import CheckpointError, ExportError
from lora_export.onnx_export.engines.protocol import Made
from lora_export.onnx_export.graphs.checks import load_graph
from lora_export.onnx_export.graphs.matmuls import kept
from lora_export.onnx_export.quantize.blockwise import AUTO
from lora_export.onnx_export.weights.map import Method
from lora_export.storage import sealed


def read_config(model: Path, adapter: Path | None = None) -> dict[str, Any]:
    """config.json of a folder of merged weights that can be exported. CheckpointError for any other, or for an
    adapter whose configuration an engine must not read."""
    path = model / "config.json"
    config = sealed.read_json(path)
    _refuse_newer(config, path)
    check_model_folder(model)
    if adapter is not None:
        check_adapter_folder(adapter)
    if config.get("quantization_config"):
        raise CheckpointError(
            "config.json still has a quantization_config: these are no merged weights",
            where=path,
            expected="a merged folder in fp32, fp16 or bf16",
            next_step="lora-export merge -b BASE -a ADAPTER -o OUT, then export OUT",
        )
    if not any(model.glob("*.safetensors")):
        raise CheckpointError(
            "the folder holds no weights as safetensors",
            where=model,
            expected="model.safetensors, or shards with an index; a .bin is a pickle, which can execute code",
        )
    return config


def _refuse_newer(config: Mapping[str, Any], path: Path) -> None:
    """A newer major renames keys, and an older reader falls back to defaults without a word."""
    from importlib.metadata import version

    installed = version("transformers")
    saved = str(config.get("transformers_version") or "0")
    major = saved.split(".")[0]
    if major.isdigit() and int(major) > int(installed.split(".")[0]):
        raise CheckpointError(
            f"config.json was saved by transformers {saved}; {installed} is installed and may misread it",
            where=path,
            expected=f"a config saved by transformers {installed.split('.')[0]} or older",
            next_step=f"pip install 'transformers>={major}'",
        )


def refuse_unused(precision: Precision, how: QuantizationOptions) -> None:
    """Options of quantization beside a precision in which nothing is quantized: ExportError, not silence."""
    if precision in get_args(Method):
        return
    for name in ("block_size", "keep", "accuracy_level", "algorithm"):
        if getattr(how, name) != getattr(QuantizationOptions(), name):
            option = {"algorithm": "quantizer"}.get(name, name).replace("_", "-")
            raise ExportError(
                f"--{option} beside --precision {precision}, in which nothing is quantized",
                expected="int4, int8 or nf4",
                next_step=f"the same command without --{option}, or with --precision int4",
            )


def refuse_unmatched(stage: Path, made: Made, patterns: Sequence[str]) -> None:
    """A pattern that keeps nothing is a mistake that nobody would see."""
    if not patterns:
        return
    names = [node.name for graph in made.graphs for node in load_graph(stage / graph).graph.node]
    for pattern in patterns:
        if pattern != AUTO and not any(kept(name, [pattern]) for name in names):
            products = [
                n.removesuffix("_Q4").removesuffix("_Q8") for n in names if n.endswith(("_Q4", "_Q8", "_Bnb4"))
            ]
            raise ExportError(
                f"no node is called {pattern!r}, which --keep says",
                expected="a node or a pattern, such as " + (products or names)[0],
                next_step="--keep '*down_proj*', say; quotes keep the shell from reading it",
            )
