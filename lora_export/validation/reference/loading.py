"""Base and merged models, loaded as transformers itself builds them, in fp32."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers.pytorch_utils import Conv1D

from lora_export import tasks
from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.errors import AdapterError, CheckpointError
from lora_export.patterns import bounded
from lora_export.sentence_modules import embeds
from lora_export.storage.sealed import read_json
from lora_export.validation.reference import streaming
from lora_export.validation.reference.files import FLOATS, START, headers
from lora_export.validation.reference.quantized import dequantize_4bit

SEED = 20_240_504


def architecture(folder: Path) -> Any:
    """The transformers class that config.json names."""
    config = config_of(folder)
    name = (config.architectures or ["AutoModel"])[0]
    cls = getattr(transformers, name, None)
    if cls is None:
        raise CheckpointError(
            f"the architecture {name!r} is not part of transformers {transformers.__version__}",
            where=folder / "config.json",
            expected="an architecture that transformers implements",
        )
    return transformers.AutoModel._model_mapping[type(config)] if cls is transformers.AutoModel else cls


def load_base(base: Path, options: MergeOptions, dequantized: Path | None = None) -> Any:
    """The base in fp32, in the class that config.json names."""
    return load_trained_on(base, options, dequantized)[0]


def classes_of(folder: Path, adapters: Sequence[AdapterChoice]) -> list[Any]:
    """The classes that adapters of this base may have been trained with: the one that config.json names, the one of
    the adapter's task (a body stored with the head of its pre-training is often trained with another), the bare
    body."""
    config = config_of(folder)
    embedder = embedder_class(folder)
    if embedder is not None:
        return [embedder]
    named = {tasks.PEFT_TASKS.get(str(c.task_type)) for c in configs_of(adapters)}
    classes = [architecture(folder)]
    for task in [*sorted(filter(None, named), key=list(tasks.TASKS).index), "feature-extraction"]:
        of_task = tasks.classes_of(task, config)
        classes += of_task if len(of_task) == 1 else []
    return list(dict.fromkeys(classes))


def embedder_class(folder: Path) -> Any:
    """The class that sentence-transformers loads from its own folder: the body alone, of an encoder-decoder its
    encoder. None for other folders."""
    if not embeds(folder):
        return None
    config = config_of(folder)
    encoders = transformers.models.auto.modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING
    alone = encoders.get(type(config)) if config.is_encoder_decoder else None
    return alone or next(iter(tasks.classes_of("feature-extraction", config)), None)


def configs_of(adapters: Sequence[AdapterChoice]) -> list[Any]:
    return [peft.PeftConfig.from_pretrained(a.folder, local_files_only=True) for a in adapters]


def config_of(folder: Path) -> Any:
    return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)


def load_trained_on(
    base: Path,
    options: MergeOptions,
    dequantized: Path | None = None,
    cls: Any = None,
    keep: int | None = None,
    written: Collection[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> tuple[Any, dict[str, torch.Tensor]]:
    """The base in fp32: dequantized by bitsandbytes if it is stored, or was trained, quantized.

    And what its files lack, as it was drawn here: from a fixed seed, so that no result depends on the hour.

    dequantized: an fp32 copy of the base that stands for it, where its format needs a library or a GPU that may not
    be here, or where it is streamed; settings: of the configuration, where `cls` has a head with other labels.
    """
    on_the_fly = options.training_quantization != "none" and options.base_weights == "dequantized"
    on_the_fly = on_the_fly and dequantized is None
    base = dequantized or base
    cls = cls or architecture(base)
    config = changed(config_of(base), settings)
    stored = getattr(config, "quantization_config", None)
    if not stored and not on_the_fly:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model, info = load(cls, base, torch.float32, keep, written, config if settings else None)
        drawn = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}
        return quiet(model), named(model, sorted(drawn))
    assert keep is None, "a quantized base is streamed from a dequantized copy"
    more: dict[str, Any] = {} if stored else {"quantization_config": _bnb_config(options)}
    more |= {"config": config, "ignore_mismatched_sizes": True} if settings else {}
    with bounded("transformers.quantizers", str(base / "config.json")), torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = cls.from_pretrained(base, dtype="auto", local_files_only=True, device_map={"": "cpu"}, **more)
    state = dequantized_state(model)
    if stored:
        del config.quantization_config
    plain = cls._from_config(config, dtype=torch.float32)
    missing, unexpected = plain.load_state_dict(state, strict=False, assign=True)
    plain.tie_weights()
    unmet = [k for k in missing if k not in (getattr(plain, "all_tied_weights_keys", None) or {})]
    if unmet or unexpected:
        raise CheckpointError("the dequantized base does not fill the model", tensor=(unmet + unexpected)[0])
    return quiet(plain), {}


def whole_tensors(adapters: Sequence[AdapterChoice]) -> set[str]:
    """Names in the base of what the adapters' files hold whole (biases, embeddings), among other names."""
    return {name.removeprefix(START) for adapter in adapters for name in headers(adapter.folder)}


def changed(config: Any, settings: Mapping[str, Any] | None) -> Any:
    """The configuration with other settings, as transformers reads them from a file."""
    return type(config).from_dict(config.to_dict() | dict(settings)) if settings else config


def load(
    cls: Any,
    folder: Path,
    dtype: Any,
    keep: int | None,
    written: Collection[str] = (),
    config: Any = None,
) -> tuple[Any, Any]:
    """(model, loading info) as transformers loads it, or streamed. config: where it is not the folder's own: what
    then has another size is drawn as what is missing is."""
    more: dict[str, Any] = {} if config is None else {"config": config, "ignore_mismatched_sizes": True}
    if keep is not None:
        return streaming.load_streamed(cls, folder, dtype, keep, written, **more)
    model, info = cls.from_pretrained(folder, dtype=dtype, local_files_only=True, output_loading_info=True, **more)
    return model, info


def named(model: torch.nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {name: state[name].clone() for name in names if name in state}


def _bnb_config(options: MergeOptions) -> Any:
    if options.training_quantization == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options.training_quantization,
        bnb_4bit_use_double_quant=options.training_double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )


def dequantized_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """fp32 tensors by name. No forward runs before this: on some CPUs that repacks 4-bit weights in place."""
    import bitsandbytes as bnb

    state: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            weight = bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
        else:
            continue
        weight = weight.float().reshape(module.out_features, module.in_features)
        # GPT-2's Conv1D is turned into a linear layer when it is quantized.
        turned = issubclass(getattr(module, "source_cls", torch.nn.Linear), Conv1D)
        state[f"{name}.weight"] = weight.T.contiguous() if turned else weight
    for name, value in [*model.named_parameters(), *_persistent_buffers(model)]:
        module = name.rpartition(".")[0]
        if name not in state and not (name.endswith((".SCB", ".weight_format")) and f"{module}.weight" in state):
            state[name] = value.detach().float() if value.is_floating_point() else value
    return state


def _persistent_buffers(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    kept = set(model.state_dict())
    return [(n, b) for n, b in model.named_buffers() if n in kept]


def load_merged(
    merged: Path,
    cls: Any = None,
    absent: Mapping[str, torch.Tensor] | None = None,
    keep: int | None = None,
) -> tuple[Any, dict[str, torch.dtype]]:
    """The merged folder as transformers loads it, then widened to fp32; and the types of parameters and buffers.

    absent: tensors that the base's files lack, too; they are taken from here. keep: as of load_unmerged.
    """
    absent = absent or {}
    if read_json(merged / "config.json").get("quantization_config"):
        raise CheckpointError(
            "config.json still has a quantization_config: these are not merged weights",
            where=merged / "config.json",
            expected="a folder that `lora-export merge` made",
        )
    model, info = load(cls or architecture(merged), merged, "auto", keep)
    missing = set(info["missing_keys"]) - absent.keys()
    if missing or info["mismatched_keys"]:
        name = sorted(missing or {k[0] for k in info["mismatched_keys"]})[0]
        raise AdapterError(
            "the merged folder does not fill the model: a tensor is missing or has another shape",
            where=merged,
            tensor=name,
            expected="every tensor of the architecture",
        )
    dtypes = {n: streaming.stored_dtype(p) for n, p in model.named_parameters()}
    dtypes |= {n: b.dtype for n, b in _persistent_buffers(model) if b.is_floating_point()}
    model.float()
    streaming.attach(model, ())
    shared = {n: absent[n] for n in info["missing_keys"]}
    for name in shared:
        dtypes[name] = torch.float32
    model.load_state_dict(shared, strict=False)
    return quiet(model), dtypes


def load_as_stored(merged: Path) -> Any:
    """What a user of transformers gets from this folder with dtype="auto", ready for inference."""
    return quiet(architecture(merged).from_pretrained(merged, dtype="auto", local_files_only=True))


def own_type(dtypes: Mapping[str, torch.dtype]) -> str | None:
    """The type that the model computes in, or None if it is fp32 anyway, and nothing is to be compared."""
    narrow = {d for d in dtypes.values() if d != torch.float32}
    return str(max(narrow, key=lambda d: torch.finfo(d).eps)).removeprefix("torch.") if narrow else None


def stored_dtypes(folder: Path, unmerged: Any) -> dict[str, torch.dtype]:
    """Plain name of each parameter of the base in `unmerged` → the type that it has in the folder's headers.

    A parameter that no file names (a stacked one, say) has the narrowest type that is there.
    """
    stored = {name: FLOATS[t.dtype] for name, t in headers(folder).items() if t.dtype in FLOATS}
    narrowest = max(stored.values(), key=lambda d: torch.finfo(d).eps)
    plain = (n for n, _ in unmerged.base_model.model.named_parameters() if "lora_" not in n)
    names = (n.replace(".base_layer", "").replace(".original_module", "") for n in plain)
    return {name: stored.get(name, narrowest) for name in names}


def quiet(model: Any) -> Any:
    model.eval()
    model.requires_grad_(False)
    return model
