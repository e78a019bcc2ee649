"""The models that are compared, as transformers and PEFT themselves build them, in fp32.

This is the oracle: PEFT's unmerged forward. It shares no formula and no reader with merging/ and adapters/.
"""

import contextlib
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import peft.utils.error
import torch

from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.errors import AdapterError
from lora_export.patterns import bounded
from lora_export.validation.reference import streaming
from lora_export.validation.reference.files import START, adapter_config, headers
from lora_export.validation.reference.kept import KeptBase
from lora_export.validation.reference.loading import (
    architecture,
    classes_of,
    configs_of,
    load_trained_on,
    quiet,
    whole_tensors,
)
from lora_export.validation.reference.mended import mend, repeatable, weigh
from lora_export.validation.reference.probes import wrapped_modules
from lora_export.validation.reference.renamed import bone_as_miss, names_as_they_are, with_todays_names
from lora_export.validation.reference.trained import Trained, fit_vocabulary, saved_twice, trained_as

LIKELY_RANK = 1024  # that a configuration may give without a tensor to show for it: each of them may have its own
MOST_LAYERS = 10_000


@dataclass(frozen=True)
class Unmerged:
    """model: PEFT's; cls: the transformers class of its base; absent: what that class has and the base's files have
    not (a pooler, say), with the values that it began with here; plain: names of the base's parameters and buffers
    before an adapter was attached; adapters: those that PEFT loaded, copies with
    other names where PEFT finds no place for their own."""

    model: Any
    cls: Any
    absent: Mapping[str, torch.Tensor]
    adapters: tuple[AdapterChoice, ...]
    plain: tuple[str, ...] = ()


def load_unmerged(
    base: Path,
    adapters: Sequence[AdapterChoice],
    options: MergeOptions,
    dequantized: Path | None = None,
    keep: int | None = None,
    scratch: Path | None = None,
    kept: KeptBase | None = None,
) -> Unmerged:
    """keep: None for a base in memory; else it is streamed, and so many bytes of it may stay there between uses.
    scratch: where renamed copies of adapters may be kept (None: they are gone when this returns). kept: a base that
    is in memory may be used, and stays for the next adapter.

    The class is that of a head which the base has not (`trained_as`), or the first of these into which every tensor
    of the adapters fits: the one that config.json names, the one of the adapter's task, the bare body. Where none
    is, the adapters are tried again under the names that the class gives its modules today. AdapterError if there
    is none.
    """
    with bone_as_miss(adapters) as known:
        trained = trained_as(base, known, options.task)
        attachment = _Attachment(base, known, options, dequantized, keep, trained, kept or KeptBase(keeps=False))
        reference, why = attachment.first_that_fits(None)
        if reference is None:
            with tempfile.TemporaryDirectory(prefix="lora-export-") as fleeting:
                reference, _ = attachment.first_that_fits(Path(fleeting) if scratch is None else scratch)
    if reference is None:
        raise why or _left_over([], architecture(base).__name__, adapters)
    return reference


@dataclass(frozen=True)
class _Attachment:
    """Adapters to be attached to a base; fields as in `load_unmerged`. trained: the class with a head that the base
    lacks, None where it lacks none."""

    base: Path
    adapters: Sequence[AdapterChoice]
    options: MergeOptions
    dequantized: Path | None
    keep: int | None
    trained: Trained | None
    kept: KeptBase

    def first_that_fits(self, scratch: Path | None) -> tuple[Unmerged | None, AdapterError | None]:
        """The first class that the adapters fit into, or the first error. scratch: None to take the adapters as
        they are, else where copies with today's names are made."""
        first: AdapterError | None = None
        adapters, trained = self.adapters, self.trained
        for number, cls in enumerate(
            [trained.cls] if trained else classes_of(self.dequantized or self.base, adapters)
        ):
            model, absent = self._load(cls, adapters)
            if self.keep is not None:
                streaming.refuse_changing_inits(configs_of(adapters), adapters[0].folder)
            choices = adapters if scratch is None else with_todays_names(adapters, model, scratch / f"{number}")
            if choices is None:
                continue
            if self.keep is not None and scratch is not None:  # the new names tell what will be written
                model, absent = self._load(cls, choices)
            plain = tuple(names_of(model))
            try:
                with contextlib.nullcontext() if scratch is None else names_as_they_are():
                    unmerged = attach_adapters(model, choices)
            except AdapterError as error:
                first = first or error
                continue
            self.kept.attached(unmerged)
            streaming.attach(model, wrapped_modules(model).values())
            return Unmerged(unmerged, cls, absent, tuple(choices), plain), None
        return None, first

    def _load(self, cls: Any, adapters: Sequence[AdapterChoice]) -> tuple[Any, Mapping[str, torch.Tensor]]:
        """The base in fp32, with the adapters' heads, and what its files lack. adapters: write over its weights."""
        heads, changes = (self.trained.heads, self.trained.changes) if self.trained else (frozenset[str](), None)
        how = self.options, self.dequantized, cls, self.keep, whole_tensors(adapters), changes
        load = partial(load_trained_on, self.base, *how)
        alone = self.keep is None and self.trained is None and self.options.training_quantization == "none"
        folder = self.dequantized or self.base
        model, absent = self.kept.take((cls, folder, _files(folder), self.base), load) if alone else load()
        _give_heads(model, self.adapters, heads)
        # The merged model must have the heads, whatever the base lacks.
        return model, {name: value for name, value in absent.items() if name not in heads}


def _give_heads(model: torch.nn.Module, adapters: Sequence[AdapterChoice], heads: Set[str]) -> None:
    """The adapters' own heads in place of those that were drawn: the base has them, too, in every comparison."""
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    for adapter in adapters:
        for key, stored in headers(adapter.folder).items():
            name = key.removeprefix(START).replace(".modules_to_save", "")
            if name in heads:
                state[name].data.copy_(stored.read())


def _files(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    """What tells that a folder is the same: names, sizes, times and places of its files."""
    found = ((file.name, file.stat()) for file in sorted(folder.iterdir()))
    return tuple((name, told.st_size, told.st_mtime_ns, told.st_ino) for name, told in found)


def names_of(model: torch.nn.Module) -> Iterator[str]:
    """Of all parameters and buffers, each under every name that it has."""
    yield from (name for name, _ in model.named_parameters(remove_duplicate=False))
    yield from (name for name, _ in model.named_buffers(remove_duplicate=False))


def attach_adapters(model: torch.nn.Module, adapters: Sequence[AdapterChoice]) -> Any:
    """PEFT's unmerged model. AdapterError if a tensor of the adapters finds no place in it."""
    try:
        with bone_as_miss(adapters) as known:
            unmerged, left = _attach(model, known)
    except peft.utils.error.NoMatchingPeftModuleError:
        raise _left_over([], type(model).__name__, adapters) from None
    except (KeyError, RuntimeError) as error:  # of a module that was saved whole, and of sizes
        raise _left_over([], type(model).__name__, adapters, str(error)) from error
    if left:
        raise _left_over(left, type(model).__name__, adapters)
    return unmerged


def _refuse_bomb(folder: Path) -> None:
    """Refuse a configuration for which PEFT would fill the memory before it looks at the tensors."""
    config = adapter_config(folder)
    patterns, replicated = config.get("rank_pattern"), config.get("layer_replication")
    sizes = [config.get("r"), config.get("init_r"), *(patterns.values() if isinstance(patterns, dict) else ())]
    rank = max((n for n in sizes if isinstance(n, int)), default=0)
    if rank > max(LIKELY_RANK, *(n for stored in headers(folder).values() for n in stored.shape)):
        raise AdapterError(
            f"the configuration gives rank {rank}, and no tensor has a dimension of that size",
            where=folder,
            expected="rank_pattern and r that describe the file",
        )
    ranges = replicated if isinstance(replicated, list) else []
    pairs = [r for r in ranges if isinstance(r, list) and len(r) == 2 and all(isinstance(n, int) for n in r)]
    if len(ranges) > MOST_LAYERS or sum(max(0, end - start) for start, end in pairs) > MOST_LAYERS:
        raise AdapterError(
            "layer_replication makes too many layers", where=folder, expected=f"at most {MOST_LAYERS}"
        )


def _left_over(tensors: Sequence[str], cls: str, adapters: Sequence[AdapterChoice], why: str = "") -> AdapterError:
    problem = f"PEFT finds no layer of {cls} that the adapter changes"
    if why:
        problem = f"PEFT cannot load the adapter into {cls}: {' '.join(why.split())[:200]}"
    elif tensors:
        count = len(tensors)
        problem = f"PEFT has no place in {cls} for {count} tensors of the adapter, or no tensor for its layers"
    return AdapterError(
        problem,
        where=adapters[0].folder,
        tensor=tensors[0] if tensors else None,
        expected="an adapter that PEFT itself loads into this base with nothing left over",
    )


def _attach(model: torch.nn.Module, adapters: Sequence[AdapterChoice]) -> tuple[Any, list[str]]:
    """(PEFT's unmerged model, tensors left over or missing). Adapters act together, each with its weight."""
    for adapter in adapters:
        _refuse_bomb(adapter.folder)
    _refuse_mixture(adapters)
    fit_vocabulary(model, adapters)
    names = [f"adapter{i}" for i in range(len(adapters))]
    configs = configs_of(adapters)
    with _load_results() as results, bounded("peft", str(adapters[0].folder)), repeatable(configs):
        unmerged = peft.PeftModel.from_pretrained(
            model, adapters[0].folder, adapter_name=names[0], local_files_only=True
        )
        for name, choice in zip(names[1:], adapters[1:], strict=True):
            unmerged.load_adapter(choice.folder, adapter_name=name)
    left = [k for r in results for k in (*r.unexpected_keys, *_unshared(unmerged, r.missing_keys))]
    left = [key for key in left if not saved_twice(key, adapters)]
    if len(names) > 1:
        unmerged.base_model.set_adapter(names)
    weigh(unmerged, {name: choice.weight for name, choice in zip(names, adapters, strict=True)})
    mend(unmerged)
    return quiet(unmerged), left


@contextlib.contextmanager
def _load_results() -> Iterator[list[Any]]:
    """What PEFT could not place of each adapter that is loaded inside: from_pretrained knows and does not tell.

    A second load would, but AdaLoRA's, whose ranks the first one has cut, cannot be loaded twice.
    """
    results: list[Any] = []
    original = peft.PeftModel.load_adapter

    def load_adapter(self: Any, *arguments: Any, **more: Any) -> Any:
        results.append(original(self, *arguments, **more))
        return results[-1]

    peft.PeftModel.load_adapter = load_adapter
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Found missing adapter keys"
            )  # they are refused by the caller
            yield results
    finally:
        peft.PeftModel.load_adapter = original


def _refuse_mixture(adapters: Sequence[AdapterChoice]) -> None:
    """PEFT's models hold adapters of one kind at a time."""
    kinds = {str(adapter_config(a.folder).get("peft_type")): a.folder for a in adapters}
    if len(kinds) > 1:
        raise AdapterError(
            f"PEFT cannot run adapters of several kinds at once: {', '.join(kinds)}",
            where=list(kinds.values())[-1],
            expected="adapters of one kind, or a --combine of their deltas",
            next_step="merge and validate one, then the next with the merged folder as its base",
        )


def _unshared(model: torch.nn.Module, missing: Sequence[str]) -> list[str]:
    """Those of the missing tensors that no other name filled: layers share VB-LoRA's bank of vectors."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    filled = {n for alike in names.values() if not alike <= {*missing} for n in alike}
    return [name for name in missing if name not in filled]
