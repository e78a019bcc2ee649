"""The jobs file of a fleet: adapters, their bases and options, as rows that are all known by name.

    precision = "int4"                     # for all rows: any option of merge-and-export and of package
    [base.smol]
    model = "owner/base@COMMIT"            # what stands here is for the rows of this base
    [[adapter]]
    name = "acme"
    base = "smol"
    adapter = "owner/acme-lora@COMMIT"
    [[adapters]]
    base = "smol"
    glob = "adapters/smol/*"               # or file = "rows.csv", or collection = "owner/slug"

CSV and JSONL have a row an adapter, with the same keys. A row beats its [[adapters]], which beats its base, which
beats what is for all. Paths are relative to the file that they stand in.
"""

import difflib
import itertools
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_export.errors import InputError
from lora_export.fleet.job_files import (
    MOST_ROWS,
    TABLES,
    Faults,
    Layer,
    Place,
    read_rows,
    read_toml,
)
from lora_export.storage.sealed import plain_name

_ROW = ("name", "base", "model", "adapter")  # keys that say which row it is; every other one is an option
_MANY = ("glob", "file", "collection")
_LONGEST_NAME = 200  # bytes: ".json" and the ending of an unfinished file fit behind it
_WEIGHTS = ".safetensors"
_WILD = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class Job:
    """A row. base: of people; model, adapters: absolute paths, Hub IDs or URLs, adapters with their weights behind
    them; layers: where its settings stand, the weakest first; place: of the row."""

    name: str
    base: str
    model: str
    adapters: tuple[str, ...]
    layers: tuple[Layer, ...]
    place: Place


def read_jobs(path: Path, options: Collection[str], faults: Faults) -> list[Job]:
    """The rows of a jobs file. options: keys that may stand in it besides those that say what a row is.

    Faults are gathered; the caller adds its own and raises them. InputError for a file that cannot be read at all.
    """
    ending = path.suffix.lower()
    if ending in TABLES:
        reader = _Reader(path, options, faults, {}, ())
        jobs = [j for layer in read_rows(path, faults) for j in reader.row(layer, ())]
    elif ending == ".toml":
        document = read_toml(path, faults)
        reader = _Reader(path, options, faults, document.bases, (document.defaults,))
        reader.check_keys(document.defaults, ("model",))
        for layer in document.bases.values():
            reader.check_keys(layer, ("model",))
        jobs = [j for layer in document.rows for j in reader.row(layer, ())]
        jobs += [j for layer in document.groups for j in reader.group(layer)]
    else:
        raise InputError(
            f"a jobs file that ends in {ending or 'nothing'}", where=path, expected=".toml, .csv or .jsonl"
        )
    if not jobs and not len(faults):
        raise InputError("the jobs file has no row", where=path, expected="[[adapter]], or a row for each adapter")
    _refuse_same_names(jobs, faults)
    return jobs


def _refuse_same_names(jobs: Sequence[Job], faults: Faults) -> None:
    seen: dict[str, Job] = {}
    for job in jobs:
        first = seen.setdefault(job.name, job)
        if first is not job:
            told = f"{job.name!r} is also the name of a row at {first.place.words()}"
            faults.add(job.place, "name", told, "names that differ: a deployment reads a row by its name")


@dataclass
class _Reader:
    path: Path
    options: Collection[str]
    faults: Faults
    bases: Mapping[str, Layer]
    defaults: tuple[Layer, ...]

    def __post_init__(self) -> None:
        self._known: dict[tuple[str, ...], bool] = {}  # keys of tables were checked before
        self._unknown: dict[tuple[str, str], Place] = {}
        self._labels: dict[str, str] = {}  # label of a base that has no name → its model

    # --- rows ------------------------------------------------------------------------------------------------

    def row(self, layer: Layer, between: tuple[Layer, ...]) -> Iterator[Job]:
        """The job of a row that names its adapter itself. between: layers of the [[adapters]] that it is in."""
        self.check_keys(layer, _ROW)
        given = layer.values.get("adapter")
        adapters = [given] if isinstance(given, str) else given
        if not isinstance(adapters, list) or not adapters or not all(isinstance(a, str) and a for a in adapters):
            found = "there is no adapter" if given is None else f"adapter = {given!r}"
            expected = 'a folder, a Hub ID or a URL, such as "owner/name@revision", or a list of them'
            self.faults.add(layer.place, "adapter", found, expected)
            return
        spelled = tuple(self._adapter(a, layer) for a in adapters)
        yield from self._job(layer.values.get("name"), spelled, (*between, layer), layer.place)

    def group(self, layer: Layer) -> Iterator[Job]:
        """The jobs of a table [[adapters]]."""
        self.check_keys(layer, ("base", "model", *_MANY))
        several = [key for key in _MANY if key in layer.values]
        if len(several) != 1 or not isinstance(layer.values[several[0]], str) or not layer.values[several[0]]:
            found = (
                f"it has {' and '.join(several)}" if len(several) > 1 else "there is nothing that names adapters"
            )
            key = several[0] if len(several) == 1 else ""
            expected = 'one of glob = "FOLDERS/*", file = "ROWS.csv" and collection = "owner/slug"'
            self.faults.add(layer.place, key, found if not key else f"{key} is not a text", expected)
            return
        said = str(layer.values[several[0]])
        if several[0] == "file":
            yield from self._file(layer, said)
        elif several[0] == "glob":
            for name, place in self._matches(layer, said):
                yield from self._job(name, (str(place),), (layer,), layer.place)
        else:
            for name, model in self._collection(layer, said):
                yield from self._job(name, (model,), (layer,), layer.place)

    def _file(self, layer: Layer, said: str) -> Iterator[Job]:
        path = layer.folder / Path(said).expanduser()
        if path.suffix.lower() not in TABLES:
            self.faults.add(layer.place, "file", f"{said!r} has another ending", "a file .csv or .jsonl")
            return
        try:
            for row in read_rows(path, self.faults):
                yield from self.row(row, (layer,))
        except InputError as error:
            self.faults.add(layer.place, "file", f"{said!r}: {error.found}", error.expected or "")

    def _job(
        self, name: object, adapters: tuple[str, ...], layers: tuple[Layer, ...], place: Place
    ) -> Iterator[Job]:
        base = self._base(layers, place)
        named = _name_of(adapters) if name is None else str(name) if type(name) is int else name
        if not _is_name(named):
            expected = "a plain name for files, at most 200 bytes: no slash, backslash, colon or leading dot"
            found = f"name = {named!r} cannot be the name of a row"
            self.faults.add(place, "name", found, expected, "" if name is not None else "give the row a name")
            return
        if base is not None:
            label, model, own = base
            yield Job(str(named), label, model, adapters, (*self.defaults, *own, *layers), place)

    # --- bases -----------------------------------------------------------------------------------------------

    def _base(self, layers: tuple[Layer, ...], place: Place) -> tuple[str, str, tuple[Layer, ...]] | None:
        """(label, model, its layer) of the base of a row, whose strongest layer that names one decides."""
        for layer in reversed(layers):
            name, model = layer.values.get("base"), layer.values.get("model")
            if name is not None and model is not None and name in self.bases:
                told = f"base = {name!r} has a model of its own, and so has this row"
                self.faults.add(layer.place, "model", told, "one of them")
                return None
            if model is not None:
                return self._unnamed(model, layer, name)
            if name is not None:
                return self._named(name, layer)
        if len(self.bases) == 1:
            return self._named(next(iter(self.bases)), layers[-1])
        for layer in self.defaults:
            if (model := layer.values.get("model")) is not None:
                return self._unnamed(model, layer, None)
        expected = f"base = one of {', '.join(self.bases)}" if self.bases else 'model = "owner/name@revision"'
        self.faults.add(place, "", "the row has no base", expected)
        return None

    def _named(self, name: object, layer: Layer) -> tuple[str, str, tuple[Layer, ...]] | None:
        if not isinstance(name, str) or name not in self.bases:
            near = difflib.get_close_matches(str(name), self.bases, n=1)
            known = f"one of {', '.join(self.bases)}" if self.bases else f"a key model, or a table [base.{name}]"
            hint = f"did you mean {near[0]}?" if near else ""
            self.faults.add(layer.place, "base", f"there is no base {name!r}", known, hint)
            return None
        own = self.bases[name]
        model = own.values.get("model")
        if model is None:
            self.faults.add(own.place, "", "the base has no model", 'model = "owner/name@revision"')
            return None
        return (name, spelled(str(model), own.folder), (own,)) if self._is_model(model, own) else None

    def _unnamed(self, model: object, layer: Layer, name: object) -> tuple[str, str, tuple[Layer, ...]] | None:
        if not self._is_model(model, layer):
            return None
        where = spelled(str(model), layer.folder)
        label = str(name) if name is not None else _last(where)
        if self._labels.setdefault(label, where) != where:
            label = where.partition("?")[0]
        return label, where, ()

    def _is_model(self, model: object, layer: Layer) -> bool:
        if isinstance(model, str) and model:
            return True
        self.faults.add(layer.place, "model", f"model = {model!r}", "a folder, a Hub ID or a URL")
        return False

    # --- adapters --------------------------------------------------------------------------------------------

    def _adapter(self, text: str, layer: Layer) -> str:
        """An adapter with its path made absolute, and its weight behind it as it was."""
        where, _, tail = text.rpartition(":")
        with_weight = bool(where) and not (layer.folder / text).exists() and _number(tail) is not None
        if with_weight and not math.isfinite(_number(tail) or 0.0):
            self.faults.add(layer.place, "adapter", f"the weight of {text!r} is {tail}", "a finite number")
        return f"{spelled(where, layer.folder)}:{tail}" if with_weight else spelled(text, layer.folder)

    def _matches(self, layer: Layer, pattern: str) -> Iterator[tuple[str, Path]]:
        """(name, path) of every folder or .safetensors file: named after what the pattern left open."""
        if "://" in pattern:
            self.faults.add(layer.place, "glob", f"{pattern!r} is a URL", "a pattern of folders here, or a file")
            return
        wanted = Path(pattern).expanduser()
        home = Path(wanted.anchor) if wanted.is_absolute() else layer.folder.absolute()
        wanted = wanted.relative_to(home) if wanted.is_absolute() else wanted
        try:
            found = list(itertools.islice(home.glob(str(wanted)), MOST_ROWS + 1))
        except (ValueError, NotImplementedError) as error:
            self.faults.add(layer.place, "glob", f"{pattern!r}: {error}", "a pattern such as adapters/*")
            return
        named = sorted((path, path.relative_to(home)) for path in found)
        paths = [(p, n) for p, n in named if _may_be_adapter(p, n)]
        if not paths or len(paths) > MOST_ROWS:
            told = f"{pattern!r} matches {f'more than {MOST_ROWS:,} adapters' if paths else 'no adapter'}"
            self.faults.add(layer.place, "glob", told, "folders, or .safetensors files")
        opened = re.compile(_expression(wanted))
        for path, name in paths[:MOST_ROWS]:
            match = opened.fullmatch(str(name))
            parts = [part for group in (match.groups() if match else ()) for part in Path(group).parts]
            yield "-".join(parts).removesuffix(_WEIGHTS) or path.stem, path

    def _collection(self, layer: Layer, slug: str) -> Iterator[tuple[str, str]]:
        """(name, Hub ID) of the models of a collection."""
        from huggingface_hub import get_collection
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        try:
            items = get_collection(slug).items
        except OfflineModeIsEnabled:
            told = f"collection = {slug!r}, which only the Hub knows, and HF_HUB_OFFLINE is set"
            self.faults.add(layer.place, "collection", told, "a network, or the adapters one by one")
            return
        except (HfHubHTTPError, OSError, ValueError) as error:
            told = f"the Hub gives no collection {slug!r}: {(str(error).splitlines() or ['?'])[0]}"
            expected = "the end of its address, such as owner/title-0123456789abcdef01234567, and a network"
            self.faults.add(layer.place, "collection", told, expected)
            return
        models = [item.item_id for item in items if item.item_type == "model"]
        if not models:
            self.faults.add(layer.place, "collection", f"{slug!r} holds no model", "a collection of adapters")
        for model in models:
            yield _last(model), model

    # --- keys ------------------------------------------------------------------------------------------------

    def check_keys(self, layer: Layer, own: Collection[str]) -> None:
        """A fault for each key that is neither an option nor one of `own`."""
        if self._known.setdefault((*layer.values, "", *own), False):
            return
        unknown = [key for key in layer.values if key not in own and key not in self.options]
        self._known[*layer.values, "", *own] = not unknown
        for key in unknown:
            # Of many rows alike the first one is told.
            place = self._unknown.setdefault((layer.place.file, key), layer.place)
            if layer.place.lines:
                place = layer.place
            near = difflib.get_close_matches(key.lower().replace("_", "-").strip("-"), {*own, *self.options}, n=1)
            expected = (
                "" if near else f"{', '.join(own)}, for, publish, or an option of merge-and-export or package"
            )
            hint = f"did you mean {near[0]}?" if near else ""
            self.faults.add(place, key, f"there is no key {key}", expected, hint)


def spelled(reference: str, folder: Path) -> str:
    """A model or adapter of a jobs file in `folder`: an absolute path, or the Hub ID or URL that it is."""
    if "://" in reference:
        return reference
    path = folder / Path(reference).expanduser()
    on_hub = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?", reference) is not None
    return reference if on_hub and not path.exists() else str(path.absolute())


def _expression(pattern: Path) -> str:
    """A regular expression of a glob's paths, whose groups are the parts with wildcards in them."""
    parts = []
    for part in pattern.parts:
        wild = "([^/]*)" if _WILD.search(part) else re.escape(part.rstrip("/"))
        parts.append("(.*?)" if part == "**" else wild)
    return "/?".join(parts)


def _may_be_adapter(path: Path, name: Path) -> bool:
    hidden = any(part.startswith(".") and part != ".." for part in name.parts)
    return not hidden and (path.is_dir() or path.suffix == _WEIGHTS)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _name_of(adapters: Sequence[str]) -> str:
    """A name after the folders: "acme", or "acme+style" of two that are combined."""
    paths = [a.rpartition(":")[0] if _number(a.rpartition(":")[2]) is not None else a for a in adapters]
    return "+".join(map(_last, paths))


def _last(reference: str) -> str:
    """The last part of a path, Hub ID (without its revision) or URL."""
    plain = reference if reference.startswith("/") else reference.partition("?")[0].partition("@")[0]
    return Path(plain).name.removesuffix(_WEIGHTS)


def _is_name(name: object) -> bool:
    if not isinstance(name, str) or not plain_name(name) or not name.isprintable() or name != name.strip():
        return False
    return not name.startswith(".") and len(name.encode("utf-8", "replace")) <= _LONGEST_NAME


def effective(job: Job, own: Collection[str] = (*_ROW, *_MANY)) -> dict[str, tuple[object, Layer]]:
    """Option → value and the layer that it is from, of all layers of a row."""
    merged: dict[str, tuple[object, Layer]] = {}
    for layer in job.layers:
        merged |= {key: (value, layer) for key, value in layer.values.items() if key not in own}
    return merged


__all__ = ["Job", "effective", "read_jobs", "spelled"]
