"""The names of a base's weights, as an adapter's names are looked up among them."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from lora_export.checkpoint.reader import Checkpoint
from lora_export.errors import AdapterError
from lora_export.merging.architecture.model import Architecture, architecture_of
from lora_export.merging.architecture.pieces import Shape, StoredPiece

INPUT_EMBEDDINGS = (
    "model.embed_tokens.weight", "embed_tokens.weight", "transformer.wte.weight", "wte.weight",
    "gpt_neox.embed_in.weight", "model.decoder.embed_tokens.weight", "transformer.word_embeddings.weight",
    "shared.weight",
)  # fmt: skip
OUTPUT_HEADS = ("lm_head.weight", "embed_out.weight")
# Where a vision-language model has its text model or its vision model under another name than that model alone.
_VISION_LANGUAGE = (
    ("model.language_model.", "model."),
    ("model.language_model.", "language_model.model."),
    ("model.visual.", "visual."),
)


@dataclass(frozen=True)
class BaseNames:
    """shapes: name → shape of each weight that the base stores; change: of prefix, as of resolve_prefix, for the
    updates of one adapter."""

    base: Checkpoint
    shapes: Mapping[str, Shape]
    change: tuple[str, str]

    def renamed(self, target: str) -> str:
        """The adapter's name with the changed prefix."""
        return rename(target, self.change)

    def stored(self, target: str) -> str | None:
        """The stored weight of this name, with or without the changed prefix."""
        return next((n for n in (self.renamed(target), target) if n in self.shapes), None)

    @cached_property
    def architecture(self) -> Architecture | None:
        return architecture_of(self.base)

    @cached_property
    def loaded(self) -> Mapping[str, tuple[StoredPiece, ...]]:
        """Name in the loaded model → the tensors on disk that make it."""
        return self.architecture.loaded(self.shapes) if self.architecture else {}


def resolve_prefix(targets: Iterable[str], weights: Collection[str]) -> tuple[str, str]:
    """(add, strip): the one change of prefix that brings all target names to weights of the checkpoint.

    A model with a task head names its body `bert.…` where the bare model has no such prefix.
    Returns ("", "") if no change explains more names than none.
    """
    wanted = list(targets)
    firsts = sorted({name.partition(".")[0] + "." for name in weights if "." in name})
    candidates = [("", "")] + [(p, "") for p in firsts]
    candidates += [("", p) for p in sorted({t.partition(".")[0] + "." for t in wanted if "." in t})]
    candidates += [change for pair in _VISION_LANGUAGE for change in (pair, pair[::-1])]

    def hits(change: tuple[str, str]) -> int:
        return sum(rename(t, change) in weights for t in wanted)

    return max(candidates, key=hits)  # max keeps the first of equals: no change


def rename(target: str, change: tuple[str, str]) -> str:
    add, strip = change
    return add + target.removeprefix(strip) if target.startswith(strip) else target


def usual_pair(weights: Collection[str]) -> tuple[str, str] | None:
    """(input embedding, output head) by their usual names; the head may be tied and not be stored."""
    embedding = next((n for n in INPUT_EMBEDDINGS if n in weights), None)
    if embedding is None:
        return None
    usual = "embed_out.weight" if embedding.startswith("gpt_neox") else "lm_head.weight"
    return embedding, next((n for n in OUTPUT_HEADS if n in weights), usual)


def tied_head(weights: Collection[str]) -> str | None:
    """The usual name of an output head that is not stored, because it is tied to an embedding that is."""
    pair = usual_pair(weights)
    return pair[1] if pair and pair[1] not in weights else None


def unknown_target(target: str, weights: Collection[str], where: str) -> AdapterError:
    """The error for an adapter that targets a weight which the base does not have."""
    leaf = ".".join(target.split(".")[-2:])
    similar = sorted(w for w in weights if w.endswith(leaf))
    return AdapterError(
        "the adapter targets a weight that the base does not have",
        where=where,
        tensor=target,
        expected=f"a name such as {similar[0]}" if similar else f"a base with a weight named …{leaf}",
        next_step="check with `lora-export inspect ADAPTER` which base it was trained on, and give that as -b",
    )
