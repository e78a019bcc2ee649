"""What an export refuses before any work, or before anything is written: models, options, patterns."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from lora_export.allowed import check_adapter_folder, check_model_folder
from lora_export.choices import Precision
from lora_export.contracts import QuantizationOptions
from lora_export.errors import CheckpointError, ExportError
from lora_export.onnx_export.embedders import as_exported
from lora_export.onnx_export.engines.protocol import Made
from lora_export.onnx_export.graphs.checks import load_graph
from lora_export.onnx_export.quantize.settings import AUTO, TOUCHED, WORDS, chosen
from lora_export.onnx_export.weights import map as weights_map
from lora_export.onnx_export.weights.map import Method
from lora_export.storage import sealed


def read_config(model: Path, adapter: Path | None = None) -> dict[str, Any]:
    """config.json of a folder of merged weights that can be exported. CheckpointError for any other folder, and for
    an adapter whose configuration an engine must not read."""
    path = model / "config.json"
    config = sealed.read_json(path)
    _refuse_newer(config, path)
    check_model_folder(model)
    if adapter is not None:
        check_adapter_folder(adapter)
    if config.get("quantization_config"):
        raise CheckpointError(
            "config.json still has a quantization_config: these are not merged weights",
            where=path,
            expected="a merged folder in fp32, fp16 or bf16",
            next_step="lora-export merge -b BASE -a ADAPTER -o OUT, then export OUT",
        )
    if not any(model.glob("*.safetensors")):
        raise CheckpointError(
            "the folder has no safetensors weights",
            where=model,
            expected="model.safetensors, or shards with an index; a .bin is a pickle, which can execute code",
        )
    return as_exported(config, model)


def _refuse_newer(config: Mapping[str, Any], path: Path) -> None:
    """A newer major version renames keys, for which an older reader silently takes its defaults."""
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
    """ExportError for options of quantization together with a precision that quantizes nothing."""
    if precision in get_args(Method):
        if AUTO in how.keep and how.activations != "float":
            raise ExportError(
                f"--keep auto with --activations {how.activations}",
                expected="names or patterns of nodes, or of checkpoint tensors",
                next_step="name them with --keep, or drop --keep auto",
            )
        return
    for name in ("block_size", "keep", "accuracy_level", "algorithm"):
        if getattr(how, name) != getattr(QuantizationOptions(), name):
            option = {"algorithm": "quantizer"}.get(name, name).replace("_", "-")
            raise ExportError(
                f"--{option} with --precision {precision}, which quantizes nothing",
                expected="int4, int8 or nf4",
                next_step=f"the same command without --{option}, or with --precision int4",
            )


def refuse_untold(how: QuantizationOptions, model: Path) -> None:
    """ExportError for --keep touched where nobody knows what adapters changed."""
    if TOUCHED in how.keep and not how.touched:
        raise ExportError(
            "--keep touched, and nothing says which tensors an adapter changed",
            where=model,
            expected="a merged folder with its certificate, or the base and its adapters in one run",
            next_step="lora-export merge -b BASE -a ADAPTER -o MERGED, then export -m MERGED; or merge-and-export",
        )


def refuse_unmatched(stage: Path, made: Made, how: QuantizationOptions) -> None:
    """ExportError for a pattern that matches nothing: a mistake that would go unnoticed."""
    patterns = [p for p in (*how.keep, *how.eight_bits) if p not in WORDS]
    if not patterns:
        return
    nodes = [node.name for graph in made.graphs for node in load_graph(stage / graph).graph.node]
    plain = [n.removesuffix("_Q4").removesuffix("_Q8").removesuffix("_Bnb4") for n in nodes]
    tensors = weights_map.read(stage).tensors if made.described else frozenset()
    names: dict[str, tuple[str, ...]] = dict.fromkeys([*nodes, *plain, *tensors], ())
    for pattern in patterns:
        if not chosen(names, [pattern]):
            products = [p for p, n in zip(plain, nodes, strict=True) if p != n]
            raise ExportError(
                f"--keep {pattern!r} matches no node, and no tensor of the checkpoint",
                expected="a node, a tensor or a pattern, such as " + (products or nodes)[0],
                next_step="for example --keep '*down_proj*', in quotes because of the shell",
            )
