"""The models that are compared, as transformers and PEFT themselves build them, in fp32.

This is the oracle: PEFT's unmerged forward. It shares no formula and no reader with merge/ and adapters/.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.pytorch_utils import Conv1D

from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.errors import AdapterError, CheckpointError
from lora_export.validation.requantize import dequantize_4bit


def architecture(folder: Path) -> Any:
    """The transformers class that config.json names."""
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    name = (config.architectures or ["AutoModel"])[0]
    cls = getattr(transformers, name, None)
    if cls is None:
        raise CheckpointError(
            f"the architecture {name!r} is not part of transformers {transformers.__version__}",
            where=folder / "config.json",
            expected="an architecture that transformers implements",
        )
    return cls


def load_base(base: Path, options: MergeOptions, dequantized: Path | None = None) -> Any:
    """The base in fp32: dequantized by bitsandbytes if it is stored, or was trained, quantized.

    dequantized: an fp32 copy of the base that stands for it, where its format needs a library or a GPU that may not
    be here.
    """
    base = dequantized or base
    cls = architecture(base)
    config = transformers.AutoConfig.from_pretrained(base, local_files_only=True)
    stored = getattr(config, "quantization_config", None)
    on_the_fly = options.training_quantization != "none" and options.base_weights == "dequantized"
    if not stored and not on_the_fly:
        return _quiet(cls.from_pretrained(base, dtype=torch.float32, local_files_only=True))
    settings = {} if stored else {"quantization_config": _bnb_config(options)}
    model = cls.from_pretrained(base, dtype="auto", local_files_only=True, device_map={"": "cpu"}, **settings)
    state = _dequantized_state(model)
    if stored:
        del config.quantization_config
    plain = cls._from_config(config, dtype=torch.float32)
    missing, unexpected = plain.load_state_dict(state, strict=False, assign=True)
    plain.tie_weights()
    unmet = [k for k in missing if k not in (getattr(plain, "all_tied_weights_keys", None) or {})]
    if unmet or unexpected:
        raise CheckpointError("the dequantized base does not fill the model", tensor=(unmet + unexpected)[0])
    return _quiet(plain)


def _bnb_config(options: MergeOptions) -> Any:
    if options.training_quantization == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options.training_quantization,
        bnb_4bit_use_double_quant=options.training_double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )


def _dequantized_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
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


def attach_adapters(model: torch.nn.Module, adapters: Sequence[AdapterChoice]) -> Any:
    """PEFT's unmerged model; several adapters act together, each with its weight."""
    import peft

    names = [f"adapter{i}" for i in range(len(adapters))]
    unmerged = peft.PeftModel.from_pretrained(
        model, adapters[0].folder, adapter_name=names[0], local_files_only=True
    )
    for name, choice in zip(names[1:], adapters[1:], strict=True):
        unmerged.load_adapter(choice.folder, adapter_name=name)
    if len(names) > 1:
        unmerged.base_model.set_adapter(names)
    for module in unmerged.modules():
        for name, choice in zip(names, adapters, strict=True):
            scaling = getattr(module, "scaling", None)
            if choice.weight != 1.0 and isinstance(scaling, dict) and name in scaling:
                scaling[name] *= choice.weight
    return _quiet(unmerged)


def load_merged(merged: Path) -> tuple[Any, dict[str, torch.dtype]]:
    """The merged folder as transformers loads it, then widened to fp32; and the types that it was stored in."""
    model, info = architecture(merged).from_pretrained(
        merged, dtype="auto", local_files_only=True, output_loading_info=True
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        name = sorted(info["missing_keys"] or {k[0] for k in info["mismatched_keys"]})[0]
        raise AdapterError(
            "the merged folder does not fill the model: a tensor is missing or has another shape",
            where=merged,
            tensor=name,
            expected="every tensor of the architecture",
        )
    dtypes = {n: p.dtype for n, p in model.named_parameters()}
    return _quiet(model.float()), dtypes


def _quiet(model: Any) -> Any:
    model.eval()
    model.requires_grad_(False)
    return model
