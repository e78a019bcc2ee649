"""How the weight files of a model folder are called: by transformers or diffusers, and in variants such as fp16."""

import re
from dataclasses import dataclass
from pathlib import Path

from lora_export.errors import CheckpointError, InputError

PICKLED = (".bin", ".pt", ".pth", ".ckpt")  # endings of weights that can run code when they are loaded
STEMS = ("model", "diffusion_pytorch_model")  # of transformers, of diffusers
_NAME = re.compile(
    r"(?P<stem>model|diffusion_pytorch_model)(?:\.(?P<variant>[\w-]+?))?(?:-\d{5}-of-\d{5}(?:\.(?P<later>[\w-]+))?)?"
    r"\.safetensors"
)
_INDEX = re.compile(
    r"(?P<stem>model|diffusion_pytorch_model)(?:\.(?P<before>[\w-]+))?\.safetensors\.index(?:\.(?P<variant>[\w-]+))?\.json"
)


@dataclass(frozen=True)
class WeightFiles:
    """single: one file with every tensor; index: that of several; variant: of both names, '' for none."""

    stem: str = STEMS[0]
    variant: str = ""

    @property
    def single(self) -> str:
        return f"{self._whole}.safetensors"

    @property
    def index(self) -> str:
        return f"{self.stem}.safetensors.index{f'.{self.variant}' if self.variant else ''}.json"

    @property
    def _whole(self) -> str:
        return f"{self.stem}.{self.variant}" if self.variant else self.stem

    def shard(self, number: int, count: int) -> str:
        """The name of a shard, as diffusers and transformers write it."""
        return f"{self._whole}-{number:05d}-of-{count:05d}.safetensors"


PLAIN = WeightFiles()


def weight_files(folder: Path, variant: str | None = None) -> WeightFiles:
    """The names of the weights in a folder; PLAIN where there are none.

    variant: which of several (`--variant fp16`); None: the files without one, or the only variant there is.
    InputError for a variant that is not there; CheckpointError where the folder leaves a choice.
    """
    found = {name for path in folder.iterdir() if (name := named(path.name)) is not None}
    if variant is not None:
        chosen = [f for f in found if f.variant == variant]
        if not chosen:
            there = ", ".join(sorted({f.variant or "no variant" for f in found})) or "no weights"
            raise InputError(
                f"there are no weights of the variant {variant}",
                where=folder,
                expected=f"files such as {WeightFiles(STEMS[1], variant).single}; there: {there}",
                next_step="drop --variant, or download that variant",
            )
    else:
        chosen = [f for f in found if not f.variant] or list(found)
    if len(chosen) > 1:
        raise CheckpointError(
            f"several sets of weights: {', '.join(sorted(f.single for f in chosen))}",
            where=folder,
            expected="one set, or --variant to choose one",
            next_step="add --variant, or delete what is not meant",
        )
    return chosen[0] if chosen else PLAIN


def variants_in(folder: Path) -> tuple[str, ...]:
    """The variants of the weights in a folder, '' for those without a name."""
    found = (named(path.name) for path in folder.iterdir())
    return tuple(sorted({f.variant for f in found if f is not None}))


def named(name: str) -> WeightFiles | None:
    """The set of weight files that a file of this name belongs to; None for any other file."""
    match = _INDEX.fullmatch(name)
    if match:
        return WeightFiles(match["stem"], match["variant"] or match["before"] or "")
    match = _NAME.fullmatch(name)
    return WeightFiles(match["stem"], match["variant"] or match["later"] or "") if match else None
