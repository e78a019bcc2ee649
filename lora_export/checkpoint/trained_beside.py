"""What training left in the adapter's folder beside the adapter: carried into the output, refused, or named.

Weights that the merge does not use would be lost without a word otherwise, and the merged model be another one.
"""

from pathlib import Path

from lora_export.checkpoint.companions import module_files
from lora_export.errors import CheckpointError
from lora_export.folder_files import SENTENCE, SENTENCE_MODULES, VALUE_HEAD, is_adapters, is_state
from lora_export.storage.sealed import refuse_outward_link

_AS_SAFETENSORS = (
    "if you trust it: python -c \"import torch, safetensors.torch as s; s.save_file(torch.load('{name}', "
    "weights_only=True), '{stem}.safetensors')\", and move {name} away"
)
_PART_OF_THE_MODEL = (
    "train it as a part of the model (modules_to_save, and the task_type), or move {name} away and apply it to the "
    "merged model's outputs yourself"
)
_SWIFT = "swift export --adapters DIR --merge_lora true"
# Pattern → who writes it, what helps.
_LOST = {
    "vit.safetensors": ("ms-swift's lora_llm trained the vision tower in full", _SWIFT),
    "extra_states": ("ms-swift trained other weights in full", _SWIFT),
    "value_head.bin": ("a reward model's value head, pickled", _AS_SAFETENSORS),
    "non_lora_trainables.bin": (
        "LLaVA trained the whole projector",
        "LLaVA's scripts/merge_lora_weights.py",
    ),
    "mm_projector.bin": ("LLaVA trained the whole projector", "LLaVA's scripts/merge_lora_weights.py"),
    **{
        f"{name}.{ending}": ("the trainer saved a trained head apart", _PART_OF_THE_MODEL)
        for name in ("classifier", "score", "cls_head", "head", "regression_head", "reward_head", "qa_outputs")
        for ending in ("safetensors", "pt", "pth", "bin")
    },
}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".gguf")
_MODELS = ("model.safetensors", "model-", "pytorch_model")
MOST = 8  # names in a warning


def refuse_lost(folder: Path) -> None:
    """CheckpointError for trained weights beside the adapter that merging the adapter alone would lose."""
    for name, (why, next_step) in _LOST.items():
        path = folder / name
        if path.exists():
            raise CheckpointError(
                f"{name} is next to the adapter: {why}, and merging the adapter alone would lose it",
                where=path,
                expected="an adapter folder that holds all that was trained",
                next_step=next_step.format(name=name, stem=path.stem),
            )


def carried(folder: Path) -> list[Path]:
    """Files of the adapter's folder that belong to the merged model: a value head, sentence-transformers' modules.

    InputError for a link that leads out of the folder.
    """
    files = [folder / VALUE_HEAD]
    if (folder / SENTENCE_MODULES).is_file():
        files += [folder / name for name in sorted(SENTENCE)]
        files += module_files(folder)
    files = [p for p in files if p.is_file()]
    for path in files:
        refuse_outward_link(path, folder)
    return files


def other_weights(folder: Path) -> list[str]:
    """Other weights in the adapter's folder that nothing is made of; a base's in the same folder are left out."""
    base = (folder / "config.json").is_file()
    names = []
    for path in sorted(folder.iterdir()):
        plain = path.is_file() and path.suffix in _WEIGHTS and not path.name.startswith(".")
        known = is_adapters(path.name) or is_state(path.name) or path.name.endswith("_adapters.safetensors")
        if plain and not known and not (base and path.name.startswith(_MODELS)):
            names.append(path.name)
    return names
