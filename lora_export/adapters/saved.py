"""Whole tensors in an adapter file: modules_to_save, trained biases, resized embeddings. They replace."""

from collections.abc import Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_export.adapters.config import ensures_tying
from lora_export.adapters.kind import AdapterFile
from lora_export.contracts import TargetUpdate

if TYPE_CHECKING:
    import torch

# PEFT saves these beside the adapter when the vocabulary was resized, or when they are targets themselves.
# Where the base cannot be asked. `base_layer` in a name says the same: it is PEFT's own, of what it adapts.
EMBEDDING_NAMES = frozenset(
    {
        "embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared", "lm_head", "embed_out",
        "tokens_embed", "word_embedding", "proj_out", "output_projection", "generator_lm_head", "lm_loss",
        "vocab_projector",
    }
)  # fmt: skip
_WRAPPED = ".base_layer."
_ORIGINAL = ".original_module."


@dataclass(frozen=True)
class Replacement:
    """The trained tensor itself, read as far as it is asked for; the old weight does not enter."""

    file: AdapterFile
    key: str

    def apply(self, weight: "torch.Tensor", rows: slice) -> "torch.Tensor":
        return self.file.read(self.key, rows).reshape(weight.shape).to(weight)


def base_name(name: str) -> str:
    """The base's name of a tensor that PEFT saved whole: its wrappers removed."""
    for wrapper in (".modules_to_save", ".token_adapter", ".base_layer", ".original_module"):
        name = name.replace(wrapper, "")
    return name


def read(file: AdapterFile, claimed: Set[str]) -> list[TargetUpdate]:
    """A replacement for each whole tensor that the configuration explains; any other key is refused."""
    bias = file.config.get("bias", "none")
    # Of the layers that the kind adapts alone, whatever the kind calls it: lora_only, miss_only, fourierft_only.
    if bias not in ("none", "all") and not str(bias).endswith("_only"):
        raise file.refuse(f"bias is {bias!r}", expected="none, all or lora_only (or the like of another kind)")
    _refuse_nested(file)
    updates = []
    for target, keys in _by_target(file, claimed).items():
        kind = _kind(file, target, keys)
        if file.weight != 1.0:
            raise file.refuse(
                f"this tensor replaces the base's, so it cannot be weighted with {file.weight}",
                tensor=keys[0],
                expected="weight 1, or an adapter without modules_to_save and trained biases",
            )
        updates.append(_replace(file, keys, target, kind))
    return updates


def _refuse_nested(file: AdapterFile) -> None:
    """PEFT makes two copies of a saved module that lies in another one, trains one and may save the other; its own
    from_pretrained cannot read the file."""
    names = [str(name) for name in file.config.get("modules_to_save") or ()]
    for inner in names:
        outer = next((n for n in names if inner.startswith(f"{n}.")), None)
        held = next((key for key in file.tensors if f".{inner}." in f".{key}"), None)
        if outer is not None and held is not None:
            raise file.refuse(
                f"modules_to_save names {outer} and {inner} in it: PEFT keeps two copies of {inner}, and the file "
                "does not say which one was trained",
                tensor=held,
                expected="modules that do not contain each other",
                next_step=f'train with modules_to_save=["{outer}"]; task_type adds "classifier" and "score"',
            )


def _by_target(file: AdapterFile, claimed: Set[str]) -> dict[str, list[str]]:
    """Base name → its keys, the trained one first.

    With bias="all", PEFT saves the bias of a saved module up to three times: under its own name, inside
    .modules_to_save (the same values), and as .original_module (the old ones, which its forward ignores).
    """
    targets: dict[str, list[str]] = {}
    for key in file.tensors:
        if key not in claimed:
            targets.setdefault(base_name(key), []).append(key)
    for keys in targets.values():
        keys.sort(key=lambda k: (_ORIGINAL in k, ".modules_to_save" in k))
    return targets


def _replace(file: AdapterFile, keys: list[str], target: str, kind: str) -> TargetUpdate:
    # An embedding that was saved because the vocabulary was resized had changed before training, with its tie; a
    # trained bias is the parameter itself.
    tied = kind in ("embedding", "bias") or ensures_tying(file.config, "modules_to_save")
    # Beside a trained copy lies the resized weight that training began with, which a tied head still has.
    original = next((k for k in keys if _ORIGINAL in k), None) if not tied else None
    beneath = (_whole(file, (original,), target, "embedding", True),) if original else ()
    return replace(_whole(file, tuple(keys), target, kind, tied), beneath=beneath)


def _whole(file: AdapterFile, keys: tuple[str, ...], target: str, kind: str, tied: bool) -> TargetUpdate:
    def load(shape: tuple[int, ...]) -> Replacement:
        return Replacement(file, keys[0])

    return TargetUpdate(target, kind, keys, (file.tensors[keys[0]].shape,), load, replaces=True, tied=tied)


def _kind(file: AdapterFile, target: str, keys: list[str]) -> str:
    module, _, leaf = target.rpartition(".")
    parts = module.split(".")
    saved = tuple(file.config.get("modules_to_save") or ())
    # PEFT's rule is a plain endswith: "norm" saves input_layernorm too. What lies inside a saved module counts.
    if any(".".join(parts[: i + 1]).endswith(saved) for i in range(len(parts))):
        return "modules_to_save"
    if leaf == "bias" and file.config.get("bias", "none") != "none":
        return "bias"
    if leaf in ("weight", "bias") and _of_tokens(file, module, keys):
        return "embedding"
    raise file.refuse(
        "no adapter kind accounts for this tensor",
        tensor=target,
        expected="tensors of the adapter's kind, or modules and biases that adapter_config.json names",
        next_step="lora-export inspect ADAPTER shows how the adapter was understood",
    )


def _of_tokens(file: AdapterFile, module: str, keys: list[str]) -> bool:
    """Whether the module is an embedding or an output head, which PEFT saves whole, or one that it adapts."""
    if not EMBEDDING_NAMES.isdisjoint(module.split(".")) or any(_WRAPPED in key for key in keys):
        return True  # also what lies inside of it, such as a norm of the embeddings
    return any(f".{module}".endswith(f".{n}") or f".{n}".endswith(f".{module}") for n in file.token_modules())
