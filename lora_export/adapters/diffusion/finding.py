"""From a spelling in an adapter file to the component and the weights that it means."""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from lora_export.adapters.diffusion.names import clip, plain, table
from lora_export.adapters.diffusion.names.tables import Base, Pieces, Spelling, Table
from lora_export.adapters.kind import AdapterFile
from lora_export.contracts import Pipeline
from lora_export.errors import AdapterError

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
_FLAT = re.compile(
    r"(?P<prefix>(?:lora|oft)_(?:(?P<unet>unet|transformer|prior_unet)|te(?P<number>\d?)|prior_te)|lycoris)_+"
)
_DENOISER = re.compile(r"(?:model\.diffusion_model|diffusion_model|pipe\.dit|dit|model|net)\.")
_COMFY = re.compile(
    r"(?P<prefix>(?:text_encoders\.)?(?P<name>clip_[lgh]|(?:u?m?t5)(?:_?xx?l)?|(?<=text_encoders\.)\w+)\.)"
    r"(?:transformer\.)?"
)
_CHECKPOINT = {
    "cond_stage_model.transformer.": "clip_l",
    "cond_stage_model.model.": "clip_l",
    "conditioner.embedders.0.transformer.": "clip_l",
    "conditioner.embedders.1.transformer.": "clip_g",
}
_OUTER = ("base_model.model.", "module.")
# torch.compile, activation checkpointing and FSDP put a name of their own into others.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
_ROLES = re.compile(
    r"(?:unet|transformer(?:_\d)?|text_encoder(?:_\d)?|prior|decoder|vae|image_encoder|controlnet)$"
)
_NUMBERS = ("no", "one", "two", "three", "four")
_ORDINALS = ("", "first", "second", "third", "fourth")


@dataclass(frozen=True)
class Place:
    """component: of the pipeline; name: of the module there as the file has it, without prefixes; pieces: where."""

    component: str
    name: str
    pieces: Pieces


@dataclass(frozen=True)
class Asked:
    """components: that a spelling can mean, the first that has the name; name: without the prefix; flat: with its
    dots flattened; prefix: for messages."""

    components: tuple[str, ...]
    name: str
    flat: bool = False
    prefix: str = ""


class Finder:
    """Looks spellings up in the components of a pipeline.

    only: the one component that all names belong to (a PEFT folder), or None.
    """

    def __init__(self, file: AdapterFile, pipeline: Pipeline, shapes: Shapes, only: str | None = None) -> None:
        self._file, self._pipeline, self._shapes, self._only = file, pipeline, shapes, only
        self._tables: dict[str, Table] = {}

    def table(self, component: str) -> Table:
        if component not in self._tables:
            known = self._pipeline.components[component]
            self._tables[component] = table(known, self._shapes.get(component, {}))
        return self._tables[component]

    def find(self, spelling: str, tensor: str) -> Place | None:
        """Where a module lies; None if no weight is called so. AdapterError for a component that the pipeline does
        not have, and for a spelling that several weights share. tensor: one of the module's, for messages."""
        asked = self.asked(spelling, tensor)
        found = [
            Place(component, asked.name, pieces)
            for component in asked.components
            for pieces in self._look(component, asked)
        ]
        if len(found) > 1:
            raise self._shared(spelling, tensor, found)
        return found[0] if found else None

    def _look(self, component: str, asked: Asked) -> list[Pieces]:
        known = self.table(component)
        return known.flat(asked.name.replace(".", "_")) if asked.flat else known.dotted(asked.name)

    def asked(self, spelling: str, tensor: str) -> Asked:
        """What a spelling says by its prefix."""
        if self._only is not None:
            return Asked((self._only,), _unwrapped(spelling))
        if match := _FLAT.match(spelling):
            return self._flat(match, spelling, tensor)
        name = _unwrapped(spelling)
        head, _, rest = name.partition(".")
        if head in self._pipeline.components:
            return Asked((head,), _unwrapped(rest), prefix=f"{head}.")
        if _ROLES.match(head):
            raise self._absent(f"{head}.", head, tensor)
        for prefix, role in _CHECKPOINT.items():
            if name.startswith(prefix):
                return self._encoder(role, prefix, name.removeprefix(prefix), tensor)
        if match := _COMFY.match(name):
            return self._encoder(match["name"], match["prefix"], name[match.end() :], tensor)
        if match := _DENOISER.match(name):
            return Asked(self._denoisers(match[0], tensor), _unwrapped(name[match.end() :]), prefix=match[0])
        return self._anywhere(name)

    def _flat(self, match: re.Match[str], spelling: str, tensor: str) -> Asked:
        # Early SimpleTuner files end every name in an underscore; torch.compile adds a name.
        prefix, name = f"{match['prefix']}_", spelling[match.end() :].rstrip("_").removeprefix("orig_mod_")
        if match["number"] is None:
            if "prior" in prefix and "prior" not in self._pipeline.components:
                raise self._absent(prefix, "prior", tensor)
            if prefix == "lycoris_":  # LyCORIS wraps any model so
                return self._anywhere(name, flat=True, prefix=prefix)
            return Asked(self._denoisers(prefix, tensor), name, flat=True, prefix=prefix)
        encoders, number = self._encoders, int(match["number"] or 0)
        if not number:
            if not encoders:
                raise self._absent(prefix, "text_encoder", tensor)
            return Asked(encoders, name, flat=True, prefix=prefix)
        component = "text_encoder" if number == 1 else f"text_encoder_{number}"
        if component not in encoders and number == 3:  # FLUX's T5 is te3 for sd-scripts, as SD3's is
            component = next((e for e in encoders if self._is_t5(e)), component)
        if component not in encoders:
            raise self._absent(prefix, component, tensor)
        return Asked((component,), name, flat=True, prefix=prefix)

    def _anywhere(self, name: str, flat: bool = False, prefix: str = "") -> Asked:
        """Without the name of a model it is the denoiser's, or that of whatever else has it."""
        others = tuple(n for n in self._pipeline.components if n not in self.denoisers)
        for components in (self.denoisers, others):
            asked = Asked(components, name, flat, prefix)
            if any(self._look(c, asked) for c in components):
                return asked
        return Asked(self.denoisers or others, name, flat, prefix)

    def _encoder(self, role: str, prefix: str, name: str, tensor: str) -> Asked:
        clips = [e for e in self._encoders if self._class(e).startswith("CLIP")]
        found: tuple[str, ...]
        if role == "clip_l":
            found = tuple(c for c in clips if c == "text_encoder" or "text_encoder" not in clips)[:1]
        elif role == "clip_g":
            found = tuple(c for c in clips if c == "text_encoder_2")
        elif "t5" in role:
            found = tuple(e for e in self._encoders if self._is_t5(e))
        else:
            found = self._encoders
        if not found:
            raise self._absent(prefix, role, tensor)
        return Asked(found, _unwrapped(name), prefix=prefix)

    @cached_property
    def denoisers(self) -> tuple[str, ...]:
        return tuple(n for n in self._pipeline.components if re.match(r"(?:unet|transformer|prior)(?:_\d)?$", n))

    @cached_property
    def _encoders(self) -> tuple[str, ...]:
        return tuple(sorted(n for n in self._pipeline.components if n.startswith("text_encoder")))

    def _class(self, component: str) -> str:
        return self._pipeline.components[component].class_name

    def _is_t5(self, component: str) -> bool:
        return "T5" in self._class(component)

    def _denoisers(self, prefix: str, tensor: str) -> tuple[str, ...]:
        if not self.denoisers:
            raise self._absent(prefix, "denoiser", tensor)
        return self.denoisers

    def _absent(self, prefix: str, role: str, tensor: str) -> AdapterError:
        """In words: lora_te2_: this adapter has a second text encoder, the base StableDiffusionPipeline has one."""
        base = self._pipeline.class_name or next(iter(self._pipeline.components.values())).class_name
        encoder = re.match(r"text_encoder(?:_(\d))?$", role)
        count = _NUMBERS[min(len(self._encoders), 4)]
        if encoder:
            theirs, ours = f"a {_ORDINALS[min(int(encoder[1] or 1), 4)]} text encoder", count
        elif role in ("clip_l", "clip_g") or "t5" in role:
            theirs, ours = f"a text encoder {role}", f"{count} text encoder{'' if count == 'one' else 's'}, none so"
        else:
            theirs, ours = f"tensors for a {role}", " and ".join(self._pipeline.components) or "none"
        return self._file.refuse(
            f"{prefix}: this adapter has {theirs}, the base {base} has {ours}",
            tensor=tensor,
            expected=f"an adapter for {', '.join(self._pipeline.components)}",
            next_step="give the base that it was trained on",
        )

    def _shared(self, spelling: str, tensor: str, found: list[Place]) -> AdapterError:
        places = [f"{p.component}.{p.pieces[0].module}" for p in found]
        components = sorted({p.component for p in found})
        step = ""
        if len(components) > 1:
            step = f"merge it into one of them alone: -b {self._pipeline.folder / components[0]}"
        return self._file.refuse(
            f"{spelling} means several weights: {', '.join(places)}",
            tensor=tensor,
            expected="a name that only one weight of the base has",
            next_step=step,
        )

    def refuse_unknown(self, unknown: Mapping[str, str], modules: int) -> AdapterError:
        """The error for spellings without a weight. unknown: spelling → a tensor of it; modules: in the file."""
        spelling, tensor = next(iter(unknown.items()))
        asked = self.asked(spelling, tensor)
        base = " or ".join(f"{c} ({self._class(c)})" for c in asked.components) or "the base"
        names = self.table(asked.components[0]).names(asked.flat) if asked.components else ()
        if len(unknown) == modules:
            found = f"none of the {modules} modules of this adapter is in {base}"
            expected = "an adapter of this kind of model"
        else:
            found = f"{len(unknown)} of {modules} modules of this adapter find no weight in {base}: {spelling}"
            expected = "a weight of the base for every tensor"
        close = _closest(asked.name, names)
        if close:
            expected += f"; the base has {asked.prefix}{close}"
        return self._file.refuse(
            found, tensor=tensor, expected=expected, next_step="give the base that it was trained on"
        )


def _unwrapped(name: str) -> str:
    """Without what PEFT, DDP and torch.compile put before a name or into it."""
    if "_mod" in name:
        name = ".".join(word for word in name.split(".") if word not in _WRAPPERS)
    while name.startswith(_OUTER):
        name = next(name.removeprefix(o) for o in _OUTER if name.startswith(o))
    return name


def _closest(name: str, names: Iterable[str]) -> str | None:
    """The most similar of the names that begin and end alike, so that few are compared."""
    alike = [n for n in names if n[:4] == name[:4] and n[-3:] == name[-3:]]
    return next(iter(difflib.get_close_matches(name, alike[:400], n=1, cutoff=0.6)), None)


def component_of(file: AdapterFile, shapes: Shapes, pipeline: Pipeline | None = None) -> str:
    """The component that the modules of a PEFT folder belong to: the one that has most of them.

    pipeline: for the names of original repositories. Two text encoders of one architecture differ in their sizes,
    or the folder is called as the component is. AdapterError if no component has them, or several.
    """
    tables = {
        c: table(pipeline.components[c], s) if pipeline else Table(_plain_and_clip(c, s)) for c, s in shapes.items()
    }
    placed = {c: {n: p for n in file.tensors if (p := _trimmed(n, known))} for c, known in tables.items()}
    most = max(map(len, placed.values()), default=0)
    fits = {c: p for c, p in placed.items() if most and len(p) == most}
    if len(fits) > 1:
        fits = {c: p for c, p in fits.items() if _sizes_fit(file, p, shapes[c])} or fits
        fits = {c: p for c, p in fits.items() if c == file.folder.name} or fits
    if len(fits) == 1:
        return next(iter(fits))
    if fits:
        raise file.refuse(
            f"this adapter fits several components: {', '.join(fits)}",
            expected=f"a folder called as the component is, such as {next(iter(fits))}",
        )
    raise file.refuse(
        f"none of the modules of this adapter is in {' or '.join(shapes)}",
        tensor=next(iter(file.tensors)),
        expected="an adapter of a model of this pipeline",
        next_step="give the base that it was trained on",
    )


def _plain_and_clip(name: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterable[Spelling]:
    base = Base(name, {}, shapes)
    return (*plain.spellings(base), *clip.spellings(base))


def _trimmed(name: str, known: Table) -> Pieces | None:
    """Where the module lies that a PEFT tensor's name begins with: the longest that the base has."""
    words = _unwrapped(name).split(".")
    for stop in range(len(words) - 1, 0, -1):
        if found := known.dotted(".".join(words[:stop])):
            return found[0]
    return None


def _sizes_fit(file: AdapterFile, placed: Mapping[str, Pieces], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether low-rank factors have the sizes of their weights; other tensors are not asked."""
    for name, pieces in placed.items():
        weight, shape = shapes.get(f"{pieces[0].module}.weight", ()), file.tensors[name].shape
        if len(weight) < 2 or len(shape) < 2:
            continue
        rows = pieces[-1].rows[1] if pieces[-1].rows else weight[0]
        if (".lora_A" in name and shape[1] != weight[1]) or (".lora_B" in name and shape[0] != rows):
            return False
    return True
