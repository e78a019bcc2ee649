"""The model with the weights that an export's data files hold, read back as weights-map.json says."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from lora_export.sentence_modules import weight_files
from lora_export.validation.comparing import sentence
from lora_export.validation.graphs import weights as graph_weights
from lora_export.validation.graphs.model import Writer, shapes_of
from lora_export.validation.graphs.moments import Moments
from lora_export.validation.graphs.numbers import judged, numbers_of
from lora_export.validation.proof import reference


@contextlib.contextmanager
def model_of_graphs(request: Mapping[str, Any], graphs: Sequence[Path]) -> Iterator[reference.Loaded]:
    """Each piece is held against the checkpoint, if it has the numbers: a quantized one within its steps."""
    folder = Path(request["model"])
    shapes = shapes_of(folder)
    known = not request["streamed_numbers"]
    numbers, moments, wrong = numbers_of(folder), Moments.beside(graphs[0].parent), []
    with tempfile.TemporaryDirectory(prefix="lora-export-") as scratch:
        work = Path(scratch)
        writer = Writer(work, shapes)
        for held in graph_weights.read(graphs, shapes):
            wanted = numbers(held) if known else None
            if wanted is not None and not judged(held, wanted, None, moments)[0] <= 1:
                wrong.append(held.tensor)
            writer.add(held)
        head = writer.finish()
        model = _load(folder, work, request["architecture"], head, known)
        sentence.attach(model, folder, writer.under(weight_files(folder)))
        model.requires_grad_(False)
        words = f"{type(model).__name__} of transformers in fp32, with the weights that the graph holds"
        yield reference.Loaded(model, words, tuple(dict.fromkeys(wrong)))


def _load(folder: Path, work: Path, architecture: str, head: torch.Tensor | None, known: bool) -> Any:
    """The model of `work`; what the graph does not hold (it was folded away) comes from the checkpoint."""
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    config.save_pretrained(work)
    cls = getattr(transformers, architecture)
    model, info = cls.from_pretrained(work, dtype=torch.float32, local_files_only=True, output_loading_info=True)
    if info["missing_keys"] and known:
        whole = cls.from_pretrained(folder, dtype=torch.float32, local_files_only=True).state_dict()
        model.load_state_dict({n: whole[n] for n in info["missing_keys"] if n in whole}, strict=False)
    if head is not None:
        model.get_output_embeddings().weight = torch.nn.Parameter(head, requires_grad=False)
    return model.eval().requires_grad_(False)
