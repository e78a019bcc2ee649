"""Which quantized weights a checkpoint holds: a file a format; a method that no format reads is refused by name."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

from lora_export.contracts import TensorSource
from lora_export.errors import CheckpointError
from lora_export.plugins import plugins
from lora_export.quantization import (
    autoround,
    awq,
    bitnet,
    bitsandbytes,
    compressed,
    fp8,
    gguf,
    gptq,
    hqq,
    mlx,
    modelopt,
    mxfp4,
    quanto,
    torchao,
)
from lora_export.quantization.settings import dtype_of, settings_of
from lora_export.quantization.stored import ORIGINAL, QuantizedWeight

GROUP = "lora_export.quantization_formats"


class Format(Protocol):
    """A module of this room, or an object that another package names in the entry point group
    `lora_export.quantization_formats`, under the quant_method that it reads.

    TENSORS: what its tensors look like, for a refusal. It may also have `claims(settings)`, for settings without a
    quant_method; `is_here(source)`, for a checkpoint whose config.json has no settings; and `describe(settings)`,
    the settings in a few words.
    """

    TENSORS: str

    def find(self, source: TensorSource, config: Mapping[str, Any], dtype: str) -> Sequence[QuantizedWeight]:
        """Every weight of this format, checked by headers alone; CheckpointError for parts that do not fit.

        config: the contents of config.json; dtype: what the model computes in.
        """
        ...


# The quant_method of config.json → the format that reads it.
FORMATS: dict[str, Format] = {
    "bitsandbytes": bitsandbytes,
    "gptq": gptq,
    "awq": awq,
    "fp8": fp8,
    "mxfp8": fp8,
    "fbgemm_fp8": fp8,
    "mxfp4": mxfp4,
    "modelopt": modelopt,
    "compressed-tensors": compressed,
    "auto-round": autoround,
    "hqq": hqq,
    "quanto": quanto,
    "torchao": torchao,
    "bitnet": bitnet,
    "gguf": gguf,
    "mlx": mlx,
}
# Methods that are known and not read → what their weights are.
REFUSED = {
    "aqlm": "AQLM: sums of codebook vectors that only its own GPU kernels read",
    "vptq": "VPTQ: indices into codebooks of vectors, permuted and with residuals",
    "spqr": "SpQR: groups whose scales are themselves quantized, beside a sparse matrix of outliers",
    "higgs": "HIGGS: weights rotated by Hadamard matrices and put on a grid, laid out for one kind of GPU",
    "exl2": "EXL2: ExLlamaV2's rows of mixed bits, in the order of its own kernels",
    "exl3": "EXL3: ExLlamaV3's trellis codes of rotated weights",
    "quip": "QuIP#: weights rotated by Hadamard matrices and put on the E8 lattice",
    "quip_sharp": "QuIP#: weights rotated by Hadamard matrices and put on the E8 lattice",
    "quark": "AMD Quark: a family of formats that config.json does not describe well enough without its library",
    "eetq": "EETQ: int8 whose rows and bytes are permuted for the kernels of one generation of GPUs",
    "fp_quant": "FP-Quant: 4-bit floats of weights rotated by Hadamard matrices",
    "fouroversix": "Four Over Six: 4-bit floats with two scales to choose from for each block",
    "sinq": "SINQ: integers with a scale for each row and each column",
}


def formats() -> dict[str, Format]:
    """quant_method → format: the built-in ones, then those of plug-ins.

    InputError for a plug-in that cannot be used as one, or that claims the method of a built-in format.
    """
    brought = plugins(GROUP)
    for plugin in brought:
        plugin.check_members(Format)
        if plugin.name in FORMATS:
            raise plugin.refuse("claims a quant_method that lora-export itself reads", "a quant_method of its own")
    return {**FORMATS, **{plugin.name: cast(Format, plugin.value) for plugin in brought}}


def find_quantized(source: TensorSource, config: Mapping[str, Any]) -> dict[str, QuantizedWeight]:
    """Weight name → how to read it. Empty for a checkpoint that is not quantized."""
    method, known = method_here(source, config), formats()
    if method is None:
        return {}
    if method not in known:
        raise CheckpointError(
            f"the base is quantized with {method!r}, which this tool does not read"
            + (f" ({REFUSED[method]})" if method in REFUSED else ""),
            where="config.json",
            expected=f"an unquantized base, or one of {', '.join(known)}",
            next_step=ORIGINAL,
        )
    weights = known[method].find(source, config, dtype_of(source, config))
    if not weights:
        raise CheckpointError(
            f"config.json says that this model was quantized with {method}, but no quantized weight is here",
            where="config.json",
            expected=known[method].TENSORS,
            next_step="download the folder again, or give the unquantized base that it was made from as -b",
        )
    return {w.weight: w for w in weights}


def method_here(source: TensorSource, config: Mapping[str, Any]) -> str | None:
    """The method that the configuration names; where it is silent, the one that the tensors' names show."""
    settings = settings_of(config)
    return method_of(settings) if settings else _claimant("is_here", source)


def method_of(settings: Mapping[str, Any]) -> str:
    """The method that a quantization_config names, or that its keys show where it names none."""
    named = settings.get("quant_method")
    return str(_claimant("claims", settings) if named is None else named)


def describe(settings: Mapping[str, Any]) -> str:
    """A quantization_config in a few words."""
    method = method_of(settings)
    own = getattr(formats().get(method), "describe", None)
    return str(own(settings)) if own else f"{method} {settings.get('format', '')}".strip()


def _claimant(question: str, subject: object) -> str | None:
    """The one format whose function of this name says yes; a plug-in's only where no built-in format's does."""
    yes = [name for name, f in formats().items() if getattr(f, question, lambda _: False)(subject)]
    yes = [name for name in yes if name in FORMATS] or yes
    if len(yes) > 1:
        raise CheckpointError(
            f"this could be a checkpoint of {' or of '.join(yes)}",
            where="config.json",
            expected="a quantization_config with a quant_method",
        )
    return yes[0] if yes else None
