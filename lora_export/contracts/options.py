"""Every option of the package, declared once: on the field of a frozen dataclass, with its metadata.

The command line, the configuration file, JSON and the reference page are derived from these fields (option.py,
commands/derive.py, commands/configuration.py). A new option is one field here, and its use.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from lora_export import choices
from lora_export.contracts.option import hidden, nested, option, switched, taken_from
from lora_export.folder_files import user_cache
from lora_export.registered import engine_names
from lora_export.tasks import TASKS

# Sections of --help that several classes share; the others have that of their class.
INPUTS = "Input and output"
WEIGHTS = "Base and merged weights"
COMBINING = "Combining several adapters"
RESOURCES = "Memory, device and certificate"
EXPORT = "ONNX export"
BENCHMARK = "Benchmark"
IMAGES = "Image pipelines"
BASES = "Comparing bases (QLoRA)"
REPLACE = "Replace an existing output."
PROVIDER_HELP = "ONNX Runtime execution provider; auto: CUDA if a session really runs on it, otherwise the CPU."

# fmt: off

@dataclass(frozen=True)
class MergeOptions:
    """Options of a merge. Memory and sizes are in bytes."""

    SECTION: ClassVar[str] = WEIGHTS
    base_weights: choices.BaseWeights = option(
        "dequantized", "The base to merge into: the dequantized one, on which a QLoRA adapter was trained, or the "
        "original 16-bit one.", conditional=True,
    )
    training_quantization: choices.TrainingQuantization = option(
        "none", "How training quantized this 16-bit base on the fly (QLoRA). The adapter's own files do not say."
    )
    training_double_quant: bool = option(
        False, "Training used double quantization (bnb_4bit_use_double_quant=True).", conditional=True
    )
    dtype: Literal["keep", "float32", "float16", "bfloat16"] = option(
        "keep", "Type of the merged weights; keep: the base's own type."
    )
    max_shard_size: int | None = option(
        None, "Size of the largest output file, such as 5GB.", unit="bytes", configurable="file",
        default_text="the base's own shards", conditional=True,
    )
    max_memory: int = option(
        2 * 2**30, "Memory for the merge's arithmetic, in addition to what Python and its libraries take.",
        RESOURCES, unit="bytes", configurable="file", default_text="2GiB", changes_result=False,
    )
    expert_packing: choices.ExpertPacking = option(
        "auto", "How the adapter packs B of fused experts: rank: all experts of one rank together (PEFT); expert: "
        "all ranks of one expert (older Unsloth, Megatron-Bridge); auto: as the adapter says, otherwise as PEFT "
        "does.", conditional=True,
    )
    expert_layout: choices.ExpertLayout = option(
        "auto", "How square weights of fused experts are stored; auto: according to the adapter's peft_version.",
        conditional=True,
    )
    allow_nonfinite: bool = option(
        False, "Accept NaN and infinity in the base, the adapter or the result. By default they are refused.",
        changes_result=False,
    )
    device: choices.Device = option(
        "cpu", "Device that computes the merge, block by block.", RESOURCES, configurable="file",
        changes_result=False,
    )
    certify: choices.Certify = option(
        "sampled", "Rows of each tensor that are computed again in float64 and compared: a sample, spread evenly, "
        "or all.", RESOURCES, changes_result=False,
    )
    combine: choices.Combine = option(
        "none", "How several adapters become one change. none: each is applied to the result of the previous one; "
        "linear, cat: the weighted sum of their deltas; svd: that sum in a lower rank; ties, magnitude_prune: the "
        "largest elements of each delta, with or without a vote on the sign; dare_linear, dare_ties: elements "
        "chosen at random, scaled up to make up for the dropped ones.", COMBINING,
    )
    combine_on: Literal["deltas", "factors"] = option(
        "deltas", "What is combined: the deltas, as in the papers, or A and B separately, as PEFT's methods of "
        "these names do (LoRA of one rank).", COMBINING,
    )
    density: float | None = option(
        None, "ties, dare_…, magnitude_prune: the share of each delta that is kept.", COMBINING, above=0, maximum=1
    )
    seed: int = option(0, "dare_…: seed of the random choice.", COMBINING, minimum=0, conditional=True)
    majority_sign: choices.MajoritySign = option(
        "total", "ties, dare_ties: whether the vote weighs magnitudes (total) or counts adapters (frequency).",
        COMBINING, conditional=True,
    )
    svd_rank: int | None = option(
        None, "Reduce the combined delta of each weight to this rank.", COMBINING, minimum=1,
        default_text="for svd: the largest rank of the adapters",
    )
    task: str | None = option(
        None, "Task of the merged model, where the adapter brings a head that the base does not have (a "
        "classifier, for example) and does not say what it is for: " + ", ".join(TASKS) + ".",
        choices=tuple(TASKS), metavar="TASK", default_text="as the adapter says", conditional=True,
    )
    variant: str | None = option(
        None, "Pipelines: which of the base's weight files to read, such as fp16 for *.fp16.safetensors.", IMAGES,
        metavar="NAME", conditional=True,
    )
    skip: tuple[str, ...] = option(
        (), "Pipelines: a component, such as text_encoder, that stays unmerged although the adapter changes it; "
        "repeat for several. The certificate says so.", IMAGES, metavar="COMPONENT", conditional=True,
    )
    split_qkv_alpha: choices.SplitQkvAlpha | None = option(
        None, "Adapters that sd-scripts trained with split_qkv: their files hold the alpha of a third of their "
        "rank. file: the strength that every loader gives them; trained: that of the training.", IMAGES,
        default_text="such a file is refused", conditional=True,
    )
    force: bool = option(False, REPLACE, INPUTS, configurable="command line", json=None, changes_result=False)


@dataclass(frozen=True)
class QuantizationOptions:
    """How weights are quantized. symmetric: without zero points (None: unless int4); eight_bits: as `keep`, int8 in
    an int4 graph; touched: tensors that adapters changed; embeddings: quantize them (int8, or as a tied head)."""

    SECTION: ClassVar[str] = "Quantization of the ONNX weights"
    block_size: int | None = option(
        None, "int4, int8, nf4: numbers that share a scale.", minimum=1, default_text="64; int4 of encoders: 32"
    )
    symmetric: bool | None = None
    algorithm: choices.Quantizer = option(
        "default", "int4, int8: how weights are rounded. default (MLAS), rtn: to nearest; k_quant: searched, "
        "with zero points; gptq: so that outputs on calibration text change least.", flags=("--quantizer",),
    )
    accuracy_level: int | None = option(
        None, "int4, int8: type in which products are computed. 0: the inputs', 1: fp32, 2: fp16, 3: bf16, 4: int8",
        minimum=0, maximum=4, default_text="4 on the CPU, 0 on CUDA",
    )
    keep: tuple[str, ...] = option(
        (), "What is not quantized: nodes or tensors, by name or pattern ('*down_proj*'). touched: what adapters "
        "changed; auto (int4): what does the most measured damage for its size. Both become int8 in an int4 graph. "
        "May be given more than once.", metavar="NAME|touched|auto",
    )
    eight_bits: tuple[str, ...] = ()
    touched: tuple[str, ...] = ()
    embeddings: bool = True
    activations: choices.Activations = option(
        "float", "int8 of models that do not generate: type of a product's inputs. dynamic: int8, in a range found "
        "at run time; static: int8, in a range fixed on texts. --graph-from cannot reuse such graphs.",
    )
    calibration: Path | None = option(
        None, "gptq, --keep auto, static activations: UTF-8 file with text like what the model will see, or "
        "calibration.safetensors of an earlier gptq export.", metavar="FILE", default_text="built-in texts",
    )


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export. With `graph_from`, the precision, engine and quantization of that export hold.
    unmerged: the only adapter becomes operators of the graph; shared_as: an adapter's name in a shared folder."""

    SECTION: ClassVar[str] = EXPORT
    precision: choices.Precision = option(
        "fp32", "Precision of the ONNX weights. fp8, nvfp4, mxfp4: refused, with why.", choices=choices.PRECISIONS,
    )
    provider: choices.Provider = option("auto", PROVIDER_HELP)
    engine: str | None = option(
        None, "Export engine.", choices=engine_names, configurable="file", default_text="one that fits the model",
    )
    optimize: choices.Optimize = option(
        "full", "What the dynamo engine does to its graph: nothing, simplify it, or fuse attention, normalization "
        "and activation into ONNX Runtime's operators. The genai engine writes fused graphs only.",
        configurable="file",
    )
    quantization: QuantizationOptions = nested(QuantizationOptions)
    proof: choices.ProofLevel = option("quick", "How much of the graph is compared with PyTorch before it is kept: "
        "some lengths, paddings, steps and borders, or many of each.", changes_result=False, configurable="file")
    graph_from: Path | None = option(
        None, "An earlier export of the same base, with or without another adapter: reuse its graph and its "
        "options, and write only the weights.", metavar="EXPORTED",
    )
    unmerged: bool = option(
        False, "With one -a: add the adapter as operators of its own, with its weights in the graph, to measure "
        "what merging saves.", json=None,
    )
    shared_as: str | None = option(
        None, "With --graph-from: write only NAME.onnx and the weights that differ from the base's into OUT, which "
        "is created with the base in it if it does not exist.", metavar="NAME", json=None,
    )
    force: bool = option(False, REPLACE, INPUTS, configurable="command line", json=None)


@dataclass(frozen=True)
class CompareBases:
    """Which bases an adapter is merged into, too, to compare. original: the 16-bit base of one in 4 or 8 bits."""

    SECTION: ClassVar[str] = BASES
    requantize: choices.Requantization | None = option(None, "With --compare-bases: also measure the effect of "
        "quantizing the merged weights to this format.")
    original: Path | None = option(
        None, "With --compare-bases: the 16-bit model from which a 4- or 8-bit base was made.",
        flags=("--original-base",), metavar="BASE",
    )


@dataclass(frozen=True)
class ValidationOptions:
    """Options of validation.

    merge: the options of the merge, which decide which base is the truth. stated: those of them that a certificate
    must agree with; None: all that are not the default. again: the command that tries another precision,
    {precision} in it. The thresholds are `tolerance` noise floors.
    """

    SECTION: ClassVar[str] = "Validation"
    prompts: Path | None = option(None, "Text file with one prompt a line, in place of the built-in ones.",
        metavar="FILE")
    text: Path | None = option(
        None, "UTF-8 file of running text for the perplexities.", metavar="FILE",
        default_text="a page of Lincoln, Darwin and Austen",
    )
    rows: int | None = option(
        64, "Rows of each updated tensor that are recomputed in float64 one by one; a large number means all. "
        "Low-rank updates and fused experts are always recomputed in full, and for the others random combinations "
        "cover every element.", minimum=1,
    )
    provider: choices.Provider = option("auto", PROVIDER_HELP, EXPORT, json=None)
    merge: MergeOptions = nested(MergeOptions, json=None)
    tolerance: float = option(
        4.0, "How many noise floors the outputs may differ by. Each tensor's arithmetic has a bound of its own, "
        "which this does not change.", minimum=1, metavar="FACTOR",
    )
    min_survival: float | None = option(
        None, "Share of the adapter's effect that an ONNX export must keep; 0 accepts any. If given, merge-and-"
        "export of int4 or int8 gives more bits to as few weights as that takes.", minimum=0, maximum=1,
        default_text="0.9",
    )
    max_memory: int | None = option(
        None, "Memory for the weights that validation compares. Larger models are read layer by layer: the same "
        "checks, slower.", RESOURCES, flags=("--validation-memory",), unit="bytes", json="validation_memory",
        default_text="--max-memory if given, otherwise what the machine has", changes_result=False,
    )
    bases: CompareBases | None = switched(
        CompareBases, "--compare-bases", "For a QLoRA adapter: measure on the text the result of merging into the "
        "dequantized base and into the original one, and advise which to ship.", BASES, json=None,
    )
    steps: int = option(
        4, "Pipelines: steps of the sampling that compares pictures.", IMAGES, minimum=1, maximum=1000
    )
    size: int | None = option(
        None, "Pipelines: width and height in pixels of the pictures that are compared.", IMAGES, minimum=8,
        default_text="half of what the model's configuration says",
    )
    stated: tuple[str, ...] | None = hidden(None, json=None)
    again: str = hidden("the same command with --precision {precision}", json=None)
    seed: int | None = option(
        None, "Seed of the lengths, inputs and rows that validation draws, to repeat a run.",
        flags=("--validation-seed",), metavar="NUMBER", minimum=0, maximum=2**31 - 1, json="validation_seed",
        default_text="a new one at each run; the result states it",
    )

    @property
    def least_survival(self) -> float:
        return choices.MIN_SURVIVAL if self.min_survival is None else self.min_survival


@dataclass(frozen=True)
class BenchmarkSizes:
    """The command line's way to say `BenchmarkOptions.shapes`: a grid, or batch sizes and prompt lengths."""

    SECTION: ClassVar[str] = BENCHMARK
    grid: choices.Grid | None = option(
        None, "Batch sizes and prompt lengths to measure. "
        + "; ".join(f"{name}: {', '.join(f'{b}×{n}' for b, n in grid)}" for name, grid in choices.GRIDS.items()),
        default_text="quick where base and merged are one graph or there is no base, otherwise standard",
    )
    batches: tuple[int, ...] = option(
        (), "Batch size, in place of the grid's. May be given more than once.", flags=("--batch",), minimum=1
    )
    lengths: tuple[int, ...] = option(
        (), "Tokens in the prompt, in place of the grid's; of a pipeline of images, the side of the "
        "latent. May be given more than once.",
        flags=("--prompt-length",), minimum=1,
    )

    @property
    def shapes(self) -> choices.Shapes | None:
        if not (self.batches or self.lengths):
            return choices.GRIDS[self.grid] if self.grid else None
        (one,) = choices.GRIDS["quick"]
        batches, lengths = self.batches or (one[0],), self.lengths or (one[1],)
        return tuple((batch, length) for batch in batches for length in lengths)


@dataclass(frozen=True)
class BenchmarkOptions:
    """Options of a benchmark. shapes: (batch, prompt tokens) of each cell, None: as the graphs ask; max_seconds:
    for all cells together; configured: a configuration file and what it set, for the report."""

    SECTION: ClassVar[str] = BENCHMARK
    provider: choices.Provider = option("auto", PROVIDER_HELP, EXPORT)
    shapes: choices.Shapes | None = taken_from(BenchmarkSizes, "shapes", None)
    margin: float = option(
        0.01, "Largest relative difference in latency that still counts as none, as 1% or 0.01.", minimum=0.0005,
        maximum=0.5, unit="share", metavar="SHARE", default_text="1%",
    )
    max_seconds: float | None = option(
        None, "Time for the measurement, as 90, 90s or 5m; it ends sooner once the noise allows a verdict.",
        flags=("--max-time", "--max-seconds"), unit="seconds", metavar="TIME",
        default_text="a minute for each batch size and prompt length; 20 s for each of --sessions; where base and "
        "merged are one graph, until merged is not slower",
    )
    sessions: int = option(
        1, "How often all sessions are opened anew, each time in another order; the interval is then taken from "
        "their spread. For machines where two sessions of one graph differ. Use 1, or at least 6.", minimum=1,
        maximum=1000,
    )
    seed: int = 0
    configured: str = ""

    @property
    def seconds(self) -> float:
        each = 60.0 if self.sessions == 1 else 20.0 * self.sessions
        shapes = self.shapes or choices.GRIDS["standard"]
        return each * len(shapes) if self.max_seconds is None else self.max_seconds


@dataclass(frozen=True)
class CacheFolder:
    """The command line's way to say `StoryOptions.cache`."""

    SECTION: ClassVar[str] = RESOURCES
    folder: Path | None = option(
        None, "Folder in which is kept what a run makes of its base alone, for the next adapter of that base.",
        flags=("--cache",), metavar="DIR", default_text="lora-export in the user's cache folder",
        changes_result=False,
    )
    used: bool = option(
        True, "Take nothing from the cache, and leave nothing there.", flags=("--no-cache",), changes_result=False,
    )

    @property
    def chosen(self) -> Path | None:
        return (self.folder or user_cache()) if self.used else None


@dataclass(frozen=True)
class StoryOptions:
    """Options of a run: those of its stages. `export.provider` holds for all stages, `force` for the run.
    merged_folder: False: base and adapter go straight into the export;
    cache: None for none."""

    SECTION: ClassVar[str] = EXPORT
    merge: MergeOptions = nested(MergeOptions)
    export: ExportOptions = nested(ExportOptions, without=("unmerged", "shared_as"), flat=True)
    merged_folder: bool = option(
        True, "Stream base and adapter straight into the ONNX files. Nothing else of the merged model is written: "
        "validation compares the ONNX graph alone, and the certificate is written to OUT.",
        flags=("--no-merged-folder",),
    )
    max_size: int | None = option(None, "int4, int8: give weights more bits for the adapter's sake, as far as the "
        "graph and data files of the merged model stay within this size, such as 100MB.", unit="bytes")
    benchmark: BenchmarkOptions = nested(BenchmarkOptions)
    extra_arms: tuple[choices.ExtraArm, ...] = option(
        (), "Also measure: plugged: the adapter as ONNX Runtime plugs it into a graph with slots; pytorch: PEFT's "
        "unmerged model under PyTorch. May be given twice.", BENCHMARK, flags=("--arm",))
    validation: ValidationOptions = nested(ValidationOptions, without=("merge", "bases"), flat=True)
    cache: Path | None = taken_from(CacheFolder, "chosen", None, json=None)
    cache_size: int = option(
        10 * 10**9, "Size that the cache stays within; the bases that were not used for longest go first.",
        RESOURCES, unit="bytes", default_text="10GB", json=None, changes_result=False,
    )
    force: bool = option(False, REPLACE, INPUTS, configurable="command line", json=None)
    configured: str = ""
