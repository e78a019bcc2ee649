"""What is tried on an architecture: an adapter is trained, merged and loaded again, and compared module by module.

The oracle is the model in which the adapter was trained, as PEFT left it, in float64. Each module that PEFT wrapped
must compute what the merged model's module computes; every other parameter and buffer must be the base's own. That
needs no inputs of the architecture's own, and looks at the parts that no text reaches as well.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import peft
import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from lora_export.contracts import AdapterChoice
from lora_export.errors import LoraExportError
from lora_export.merging import merge
from tests.architectures.comparing import differing
from tests.architectures.tiny import MOST, Architecture, architectures, small
from tests.builders import randomize

Outcome = Literal["right", "wrong", "refused", "crash", "not to be had"]
KINDS = ("linear", "experts", "head saved", "head adapted", "resized")  # of a model that talks
ROWS = 4  # tokens that are added to the vocabulary
_TALKS = frozenset({"causal", "seq2seq", "masked", "image text"})
_TASKS = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS", "question": "QUESTION_ANS"}
_ADDED = ("classifier", "score", "qa_outputs")  # which PEFT saves by itself for these tasks
_BARE = ("MODEL_FOR_CAUSAL_LM", "MODEL_FOR_MASKED_LM", "MODEL")
_PAIRED = ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM", "MODEL")  # of which the causal class is a half
_ODD = ("missing_keys", "unexpected_keys", "mismatched_keys")


class NotToBeHad(Exception):
    """transformers or PEFT cannot do this, so there is nothing to compare with."""


@dataclasses.dataclass(frozen=True)
class Cell:
    architecture: Architecture
    kind: str

    def __str__(self) -> str:
        return f"{self.architecture}, {self.kind}"


@dataclasses.dataclass(frozen=True)
class Result:
    outcome: Outcome
    words: str = ""


def cells() -> list[Cell]:
    """Every architecture with all that can be tried on a model of its task."""
    found = []
    for architecture in architectures():
        kinds = KINDS if architecture.task in _TALKS else ("linear", "new head")
        found += [Cell(architecture, kind) for kind in kinds]
    return found


def run(cell: Cell, folder: Path) -> Result:
    """Train, merge and compare in `folder`."""
    try:
        trained = _train(cell, folder)
    except NotToBeHad as error:
        return Result("not to be had", str(error))
    try:
        merge(folder / "base", [AdapterChoice(folder / "adapter")], folder / "merged")
    except LoraExportError as error:
        return Result("refused", " ".join(filter(None, [error.found, error.tensor and f"({error.tensor})"])))
    except Exception as error:
        return Result("crash", f"{type(error).__name__}: {error}")
    try:
        merged, odd = _load(cell.architecture.name, folder / "merged")
    except Exception as error:
        return Result("wrong", f"transformers does not load it: {type(error).__name__}: {error}")
    differences = [*odd, *differing(trained.base_model.model.double(), merged.double())]
    return Result("wrong", "; ".join(differences[:3])) if differences else Result("right")


def _load(name: str, folder: Path) -> tuple[Any, list[str]]:
    """(the model, what its files lack or have too much)."""
    cls = getattr(transformers, name)
    model, info = cls.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return model.eval(), [f"{what} {sorted(map(str, info[what]))[:3]}" for what in _ODD if info[what]]


@contextlib.contextmanager
def _theirs() -> Iterator[None]:
    """Whatever other libraries raise inside is a reason why there is nothing to compare with."""
    try:
        yield
    except NotToBeHad:
        raise
    except Exception as error:
        raise NotToBeHad(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}") from error


def _train(cell: Cell, folder: Path) -> Any:
    """PEFT's model, whose base and adapter are saved. NotToBeHad where those libraries fail."""
    with _theirs():
        model = _base(cell, folder / "base")
        trained = peft.get_peft_model(model, _settings(cell, model, folder / "base"))
        randomize(trained, 2, tuple(n for n, p in trained.named_parameters() if p.requires_grad), 0.2)
        # PEFT looks for the words of a model that may have none, and sees new words in plain models alone.
        embeddings: Any = "auto" if cell.architecture.task in _TALKS else False
        if cell.kind == "resized" and getattr(model.config, "sub_configs", None):
            embeddings = True
        trained.save_pretrained(folder / "adapter", save_embedding_layers=embeddings)
    return trained.eval()


def _base(cell: Cell, folder: Path) -> Any:
    """The model that is to be trained, loaded from the base that is saved here."""
    torch.manual_seed(0)
    name = _bare_name(cell.architecture) if cell.kind == "new head" else cell.architecture.name
    cls, config = getattr(transformers, name), small(CONFIG_MAPPING[cell.architecture.type])
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(config).parameters())
    if size > MOST:
        raise NotToBeHad(f"{size} parameters, however small the settings")
    base = cls(config).eval()
    randomize(base, 1)
    base.save_pretrained(folder)
    again, odd = _load(name, folder)
    if odd:
        raise NotToBeHad(f"transformers does not read what it has written: {odd}")
    if cell.kind == "resized":
        again.resize_token_embeddings(again.get_input_embeddings().weight.shape[0] + ROWS, mean_resizing=False)
    return again if cell.kind != "new head" else _load(cell.architecture.name, folder)[0]


def _bare_name(architecture: Architecture) -> str:
    """The class of a checkpoint as the hub has it, without the head of this task."""
    pairs = architecture.type in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    for mapping in _PAIRED if pairs else _BARE:
        names = getattr(modeling_auto, f"{mapping}_MAPPING_NAMES")
        if architecture.type in names:
            found = names[architecture.type]
            return str(found if isinstance(found, str) else found[0])
    raise NotToBeHad("there is no bare model of this type")


def _settings(cell: Cell, model: Any, base: Path) -> Any:
    linear = [n for n, m in model.named_modules() if _is_linear(m)]
    if any("mamba" in type(m).__name__.lower() for m in model.modules()):  # its kernel reads this weight, PEFT says
        linear = [n for n in linear if not n.endswith("out_proj")]
    common: dict[str, Any] = {"r": 4, "lora_alpha": 10}
    if cell.kind == "experts":
        found = sorted(n for n, p in model.named_parameters() if p.dim() == 3 and "experts" in n.split(".")[-2])
        if not found:
            raise NotToBeHad("no fused experts")
        return peft.LoraConfig(target_modules=[], target_parameters=found, **common)
    if cell.kind == "new head":
        saved = _new_modules(cell, model, base)
        body = [n for n in linear if not any(n == s or n.startswith(f"{s}.") for s in saved)]
        task = _TASKS.get(cell.architecture.task)
        return peft.LoraConfig(target_modules=body, modules_to_save=saved, task_type=task, **common)
    output = model.get_output_embeddings() if cell.architecture.task in _TALKS else None
    head = next((n for n, m in model.named_modules() if m is output), None)
    others = [n for n in linear if n != head]
    if cell.kind in ("linear", "resized"):
        return peft.LoraConfig(target_modules=others, **common)
    if head is None:
        raise NotToBeHad("the model has no output embeddings")
    if cell.kind == "head saved":
        return peft.LoraConfig(target_modules=others, modules_to_save=[head], **common)
    return peft.LoraConfig(target_modules=[head, *others], **common)


def _is_linear(module: Any) -> bool:
    """A router that gives a tuple is a subclass, too, and PEFT's forward fails on it."""
    return isinstance(module, Conv1D) or getattr(type(module), "forward", None) is nn.Linear.forward


def _new_modules(cell: Cell, model: Any, base: Path) -> list[str]:
    """The modules that this task has and the bare model lacks, whose values are drawn at random."""
    cls = getattr(transformers, cell.architecture.name)
    missing = cls.from_pretrained(base, dtype=torch.float32, output_loading_info=True)[1]["missing_keys"]
    owners = (key.rpartition(".")[0] for key in missing)
    saved = sorted({next((h for h in _ADDED if o.startswith(f"{h}.")), o) for o in owners})
    if not saved or "" in saved:
        raise NotToBeHad(f"the task lacks {sorted(missing)[:2]}, which no modules_to_save can hold")
    return saved
