"""What the tensors of a trained module mean: its kind, and the updates of the base's weights.

Each kind is defined by LyCORIS, sd-scripts or PEFT; the formulas are in the files of this package. Kinds that are a
sum take the user's factor; all others are refused with a factor other than 1, as the tools disagree about it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lora_export.adapters.diffusion.kinds import direct, general, normed, products, rotations, scaled
from lora_export.adapters.diffusion.kinds.module import Trained, Whole, spread
from lora_export.adapters.diffusion.pieces import Shape
from lora_export.adapters.kind import AdapterFile
from lora_export.contracts import TargetUpdate
from lora_export.contracts.pipelines import TrainedModule
from lora_export.errors import AdapterError


@dataclass(frozen=True)
class Kind:
    """own: parts that only this kind has; needs: those of them that it cannot lack; beside: others that may stand
    with them; read: the updates of weights before they are cut; decomposes: DoRA may stand over it."""

    own: tuple[str, ...]
    read: Callable[[Trained], list[Whole]]
    needs: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    decomposes: bool = False


_SCALE = ("alpha", "scalar")
_WHOLE = ("alpha", "on_input", "reshape_weight")  # which trainers store as whole numbers, too
_HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "lora": Kind(
            ("lora_down", "lora_up", "lora_mid", "lora_up_bias"), products.read_lora, ("lora_down", "lora_up"),
            (*_SCALE, "diff_b", "reshape_weight"), True,
        ),
        "loha": Kind(
            (*_HADAMARD, "hada_t1", "hada_t2"), products.read_loha, _HADAMARD, (*_SCALE, "diff_b"), True
        ),
        "lokr": Kind(products.LOKR, products.read_lokr, (), (*_SCALE, "diff_b"), True),
        "ia3": Kind(("weight", "on_input"), scaled.read_ia3, ("weight", "on_input")),
        "glora": Kind(general.PARTS, general.read_glora, general.PARTS, _SCALE),
        "oft": Kind(("oft_blocks", "rescale"), rotations.read_oft, ("oft_blocks",), ("alpha",)),
        "full": Kind(("diff",), direct.read_full, (), ("diff_b",), True),
        "parameter": Kind(("diff_m",), direct.read_parameter),
        "set": Kind(("set_weight",), direct.read_set),
        "bias": Kind((), direct.read_bias, ("diff_b",), ("diff_b",)),
        "norm": Kind(("w_norm", "b_norm"), direct.read_norm),
    }
)  # fmt: skip


def kind_of(module: TrainedModule) -> str:
    """The kind by its parts: `lora`, `lora_tucker`, `loha`, …; with DoRA over it `dora`, `loha_dora`, `lokr_dora`.

    AdapterError for parts of no kind, or of several.
    """
    name, dora = _owner(module), any(part in module.keys for part in normed.SCALES)
    if name == "lora":
        return "dora" if dora else "lora_tucker" if "lora_mid" in module.keys else "lora"
    return f"{name}_dora" if dora else name


def updates_of(file: AdapterFile, module: TrainedModule, shapes: Mapping[str, Shape]) -> list[TargetUpdate]:
    """The updates of one trained module, one for each weight and bias of the base that it changes.

    shapes: of the base's tensors, by name. AdapterError for parts that are missing or too many, for shapes that are
    not the base's, and for a factor other than 1 where the kind is no sum.
    """
    trained, name = Trained(file, module, shapes), _owner(module)
    kind = KINDS[name]
    _check_parts(trained, name, kind)
    wholes = kind.read(trained)
    if any(trained.has(part) for part in normed.SCALES):
        wholes = [normed.dora(trained, whole) if whole.leaf == "weight" else whole for whole in wholes]
    return [update for whole in wholes for update in spread(trained, whole)]


def _owner(module: TrainedModule) -> str:
    found = [name for name, kind in KINDS.items() if any(part in module.keys for part in kind.own)]
    if not found and "diff_b" in module.keys:
        return "bias"
    if len(found) != 1:
        raise AdapterError(
            f"the module {module.spelling} has {', '.join(sorted(module.keys))}, "
            f"which are parts of {' and of '.join(found) or 'no kind of adapter that is known'}",
            tensor=next(iter(module.keys.values()), None),
            expected="the parts of one kind",
        )
    return found[0]


def _check_parts(trained: Trained, name: str, kind: Kind) -> None:
    keys = trained.module.keys
    missing = [part for part in kind.needs if part not in keys]
    if missing:
        raise trained.file.refuse(
            f"{' and '.join(missing)} of {trained.module.spelling} {'are' if missing[1:] else 'is'} missing",
            tensor=next(iter(keys.values())),
            expected=", ".join(kind.needs),
            next_step="use the file as the trainer saved it",
        )
    types = {part: trained.file.tensors[key].dtype for part, key in keys.items() if part not in _WHOLE}
    integer = next((part for part, dtype in types.items() if not dtype.startswith(("F", "BF"))), None)
    if integer:
        raise trained.file.refuse(
            f"{integer} of {trained.module.spelling} is {types[integer]}",
            tensor=keys[integer],
            expected="floating-point numbers",
            next_step="use the file as the trainer saved it",
        )
    known = {*kind.own, *kind.beside, *(normed.SCALES if kind.decomposes else ())}
    extra = [part for part in keys if part not in known]
    scales = [part for part in normed.SCALES if part in keys]
    extra += scales[1:] + [part for part in ("lora_up_bias",) if scales and part in keys]
    if extra:
        raise trained.file.refuse(
            f"{extra[0]} of {trained.module.spelling} stands beside parts of {name}, which has no such part",
            tensor=keys[extra[0]],
            expected=f"parts of {name} alone",
        )
