"""What an adapter's folder says of the quantization of its base in training: names of bases, and the model card.

An adapter's own files do not tell. Trainers on 4 bits name a repository that is stored so, and older versions of
PEFT wrote the configuration of bitsandbytes into README.md.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from lora_export.contracts import Adapter, BaseCheck, MergeOptions

MOST = 2**18  # characters of a model card

_BITSANDBYTES = re.compile(r"-(?P<unsloth>unsloth-)?bnb-(?P<bits>[48])bit$", re.IGNORECASE)
_OTHER = re.compile(r"-(gptq|awq|fp8|mlx|[2-8]-?bit)(-[\w.]+)*$", re.IGNORECASE)
_CARD = re.compile(r"\bload_in_(?P<bits>[48])bit\W{1,4}true\b", re.IGNORECASE)
_DOUBLE = re.compile(r"\bbnb_4bit_use_double_quant\W{1,4}true\b", re.IGNORECASE)
_FP4 = re.compile(r"\bbnb_4bit_quant_type\W{1,4}fp4\b", re.IGNORECASE)


def training_checks(adapter: Adapter, options: MergeOptions, quantized: bool) -> Iterator[BaseCheck]:
    """Nothing where the merge is told how training quantized the base, or where the base is stored quantized.

    quantized: whether it is.
    """
    if quantized or options.training_quantization != "none":
        return
    name = str(adapter.config.get("base_model_name_or_path") or "")
    name = Path(name).name if Path(name).is_absolute() else name
    named, card = _BITSANDBYTES.search(name), _card(adapter.folder)
    if named is not None:
        told, flags = f"the adapter was trained on {name}", _flags(named["bits"], True, False)
        more = f", or by {name} itself as -b" + (
            ", some of whose layers stay in 16 bits" if named["unsloth"] else ""
        )
    elif (said := _CARD.search(card)) is not None:
        flags = _flags(said["bits"], _DOUBLE.search(card) is not None, _FP4.search(card) is not None)
        told, more = f"the adapter's README.md says load_in_{said['bits']}bit", ""
    elif _OTHER.search(name):
        told, flags, more = f"the adapter was trained on {name}", "", f"{name} itself as -b"
    else:
        return
    yield BaseCheck(
        "training quantization",
        "differs",
        f"{told}, so training saw quantized weights, and this base has them in 16 bits or more. What training "
        f"computed is reproduced by {flags}{more}",
    )


def unquantized(name: str) -> str:
    """The name of a base without what says that it is stored in 4 or 8 bits for bitsandbytes."""
    return _BITSANDBYTES.sub("", name)


def _flags(bits: str, double: bool, fp4: bool) -> str:
    if bits == "8":
        return "--training-quantization int8"
    return f"--training-quantization {'fp4' if fp4 else 'nf4'}" + (" --training-double-quant" if double else "")


def _card(folder: Path) -> str:
    """The beginning of README.md; nothing where it is no file of this folder."""
    path = folder / "README.md"
    if path.is_symlink() or not path.is_file():
        return ""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(MOST)
