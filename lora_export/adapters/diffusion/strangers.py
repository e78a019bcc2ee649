"""What lies in files like those of adapters and is none of a weight, told by its names; and embeddings."""

import re
from collections.abc import Collection, Iterable, Mapping

from lora_export.adapters.kind import AdapterFile
from lora_export.contracts import TensorInfo
from lora_export.errors import AdapterError

_STRANGERS = (
    (r"^image_proj\.|^ip_adapter\.|to_[kv]_ip\b|^proj\.perceiver", "an IP-Adapter: it adds attention to a picture"),
    (r"^lora_controlnet$", "a control-LoRA, a ControlNet made of a UNet and low-rank differences"),
    (r"^lllite_", "a ControlNet-LLLite, which adds modules that see a control picture"),
    (
        r"^control_model\.|^controlnet_|\binput_hint_block\b|\bzero_convs?\b|^controlnet\.|_hint_",
        "a ControlNet, a second network beside the denoiser",
    ),
    (r"^\d{3,4}\.\d+\.(?:linear|weight|bias)|hypernetwork", "a hypernetwork, which changes activations"),
    (r"prompt_embeddings|prompt_encoder|^prefix_encoder", "prompt embeddings, which stand beside the weights"),
    (r"\.ia3_l\b", "PEFT's (IA)³ without its adapter_config.json"),
    (
        r"\.(?:oft_[rR]|boft_[RS]|vera_lambda_[bd]|hra_u|shira_\w+)\b",
        "an adapter of PEFT without adapter_config.json",
    ),
    (r"^(?:adapter|body)\.\d+\.|^motion_adapter\.", "another network beside the denoiser"),
    (r"^first_stage_model\.|^model\.diffusion_model\..*\.(?:weight|bias)$", "a whole checkpoint, not an adapter"),
)
_ADAPTED = re.compile(
    r"lora|hada_|lokr_|oft_blocks|\.diff(?:_[bm])?$|\.[ab][12]\.weight$|on_input$|_norm$|set_weight$"
)
_VECTORS = re.compile(
    r"bundle_emb\..+|string_to_param(?:\..+)?|emb_params|clip_[lg]|t5(?:xxl)?|text_encoders_\d|<[^<>]+>"
)
_EMBEDDINGS = ("token_embedding.weight", "embed_tokens.weight", "shared.weight")


def refuse_strangers(file: AdapterFile) -> None:
    """AdapterError for a file of another nature, by the names of its tensors."""
    for pattern, what in _STRANGERS:
        expression = re.compile(pattern)
        for name in file.tensors:
            if expression.search(name) and (pattern == r"^lora_controlnet$" or not _ADAPTED.search(name)):
                raise file.refuse(
                    f"this is {what}",
                    tensor=name,
                    expected="an adapter that changes weights of a pipeline's models",
                )


def vectors(
    file: AdapterFile, names: Iterable[str], shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> list[str]:
    """Those of the tensors that are textual-inversion vectors.

    diffusers' files call a vector as its token, which may be any word: one whose size is that of a text encoder's
    embeddings, in a file with nothing else.
    """
    names = list(names)
    known = [n for n in names if _VECTORS.fullmatch(n)]
    others = [n for n in names if n not in set(known)]
    widths = {
        shape[-1]
        for tensors in shapes.values()
        for name, shape in tensors.items()
        if name.endswith(_EMBEDDINGS) and len(shape) == 2
    }
    alone = len(names) == len(file.tensors)
    for name in others:
        shape = file.tensors[name].shape
        if alone and "." not in name and len(shape) in (1, 2) and shape[-1] in widths:
            known.append(name)
    return known


def refuse_other(file: AdapterFile, others: Collection[str]) -> AdapterError:
    """The error for tensors whose ending is not known."""
    name = min(others)
    whole = name.endswith((".weight", ".bias")) and "lora" not in name
    what = "whole weights, not differences" if whole else "tensors with an ending that no kind of adapter has"
    return file.refuse(
        f"{len(others)} of {len(file.tensors)} tensors are {what}",
        tensor=name,
        expected="endings such as .lora_down.weight, .lora_A.weight, .hada_w1_a, .lokr_w1, .diff",
    )


def refuse_empty(file: AdapterFile) -> None:
    for name, info in file.tensors.items():
        if 0 in info.shape:
            raise _empty(file, name, info)


def _empty(file: AdapterFile, name: str, info: TensorInfo) -> AdapterError:
    return file.refuse(
        f"the tensor is empty, its shape {list(info.shape)}",
        tensor=name,
        expected="trained values",
        next_step="save the adapter again with its trainer",
    )
