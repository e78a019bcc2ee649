"""genai_config.json and the file beside it that only onnxruntime-genai reads.

The keys are those of the runtime's own reader (src/config.cpp of microsoft/onnxruntime-genai) that concern a
decoder or an encoder-decoder. Left out, and so refused: what loads native code (`custom_ops_library`, libraries of
other providers), writes files (`enable_profiling`), leads out of the folder (`tokenizer_dir`, `data_file`), passes
memory addresses (`gpu_external_alloc`, `user_compute_stream`), and every part that this tool does not write.
"""

from pathlib import Path

from lora_export.allowed.fields import (
    DIGITS,
    FLAG,
    GRAPH,
    NUMBER,
    WHOLE,
    WORD,
    Rule,
    check,
    one_of,
    read,
)

NAME = "genai_config.json"
AUDIO, VISION = "audio_processor_config.json", "vision_processor.json"

_SWITCH = one_of("0", "1")
_CUDA: Rule = {
    "arena_extend_strategy": WORD, "cudnn_conv_algo_search": WORD, "cudnn_conv_use_max_workspace": _SWITCH,
    "cudnn_conv1d_pad_to_nc1d": _SWITCH, "device_id": DIGITS, "do_copy_in_default_stream": _SWITCH,
    "enable_cuda_graph": _SWITCH, "enable_skip_layer_norm_strict_mode": _SWITCH, "fuse_conv_bias": _SWITCH,
    "gpu_mem_limit": DIGITS, "prefer_nhwc": _SWITCH, "sdpa_kernel": DIGITS, "tunable_op_enable": _SWITCH,
    "tunable_op_tuning_enable": _SWITCH, "use_ep_level_unified_stream": _SWITCH, "use_tf32": _SWITCH,
}  # fmt: skip
_SESSION: Rule = {
    "enable_cpu_mem_arena": FLAG, "enable_mem_pattern": FLAG, "inter_op_num_threads": WHOLE,
    "intra_op_num_threads": WHOLE, "log_id": WORD, "log_severity_level": WHOLE, "log_verbosity_level": WHOLE,
    "graph_optimization_level":
        one_of("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"),
    "ep.cuda.fpa_intb_gemm": _SWITCH, "session.inter_op.allow_spinning": _SWITCH,
    "session.intra_op.allow_spinning": _SWITCH, "session.set_denormal_as_zero": _SWITCH,
    "session.use_device_allocator_for_initializers": _SWITCH,
    "provider_options": [{"cpu": {}, "cuda": _CUDA}],
}  # fmt: skip


def _names(text: str) -> Rule:
    return dict.fromkeys(text.split(), WORD)


_SIZES: Rule = dict.fromkeys(
    ("head_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads"), WHOLE
)
_ENCODER: Rule = _SIZES | {
    "filename": GRAPH,
    "session_options": _SESSION,
    "inputs": _names("input_ids inputs_embeds attention_mask position_ids audio_features"),
    "outputs": _names("encoder_hidden_states encoder_outputs cross_present_key_names cross_present_value_names"),
}
_DECODER: Rule = _SIZES | {
    "filename": GRAPH,
    "session_options": _SESSION,
    "inputs": _names(
        "input_ids inputs_embeds attention_mask position_ids past_key_names past_value_names past_names "
        "cross_past_key_names cross_past_value_names past_sequence_length current_sequence_length "
        "total_sequence_length encoder_hidden_states encoder_attention_mask past_key_values_length "
        "cache_indirection past_conv_names"
    ),
    "outputs": _names(
        "logits present_key_names present_value_names present_names output_cross_qk_names present_conv_names "
        "hidden_states"
    ),
    "conv_cache_size": WHOLE,
    "layer_types": [WORD],
    "sliding_window": {
        "alignment": one_of("left", "right"), "cache_slack": WHOLE, "layers": [WHOLE], "pad_value": WHOLE,
        "slide_inputs": FLAG, "slide_key_value_cache": FLAG, "window_size": WHOLE,
    },
}  # fmt: skip
_IDS: Rule = dict.fromkeys(
    (
        "audio_token_id", "boa_token_id", "bor_token_id", "bos_token_id", "bot_token_id", "decoder_start_token_id",
        "eor_token_id", "eot_token_id", "image_token_id", "pad_token_id", "sep_token_id", "video_token_id",
        "vision_start_token_id",
    ),
    WHOLE,
)  # fmt: skip
_VISION: Rule = {
    "filename": GRAPH, "config_filename": one_of(VISION), "session_options": _SESSION, "patch_size": WHOLE,
    "spatial_merge_size": WHOLE, "inputs": _names("pixel_values image_grid_thw"),
    "outputs": _names("image_features"),
}  # fmt: skip
_EMBEDDING: Rule = {
    "filename": GRAPH, "session_options": _SESSION, "inputs": _names("input_ids image_features"),
    "outputs": _names("inputs_embeds"),
}  # fmt: skip
_MODEL: Rule = _IDS | {
    "vision": _VISION, "embedding": _EMBEDDING,
    "context_length": WHOLE, "decoder": _DECODER, "encoder": _ENCODER, "eos_token_id": (WHOLE, [WHOLE]),
    "type": WORD, "vocab_size": WHOLE,
}  # fmt: skip
_SEARCH: Rule = {
    **dict.fromkeys(("do_sample", "early_stopping", "past_present_share_buffer"), FLAG),
    **dict.fromkeys(
        (
            "batch_size", "chunk_size", "max_length", "min_length", "no_repeat_ngram_size", "num_beams",
            "num_return_sequences", "random_seed", "top_k",
        ),
        WHOLE,
    ),
    **dict.fromkeys(("diversity_penalty", "length_penalty", "repetition_penalty", "temperature", "top_p"), NUMBER),
}  # fmt: skip
_BATCHING: Rule = {
    "block_size": WHOLE, "gpu_utilization_factor": NUMBER, "max_batch_size": WHOLE, "max_scheduled_tokens": WHOLE,
    "num_blocks": WHOLE,
}  # fmt: skip
_CONFIG: Rule = {
    "model": _MODEL,
    "search": _SEARCH,
    "engine": {"dynamic_batching": _BATCHING, "static_batching": {"max_batch_size": WHOLE}},
    "speculative": {"max_draft_tokens": WHOLE},
}
# The builder writes this document only for Whisper; its operations name compiled-in functions.
_ATTRIBUTES: Rule = {str: (WHOLE, NUMBER, [NUMBER])}
_OPERATION: Rule = {
    "name": WORD,
    "type": one_of("AudioDecoder", "STFTNorm", "LogMelSpectrum", "Phi4AudioEmbed"),
    "attrs": _ATTRIBUTES,
}
_AUDIO: Rule = {"feature_extraction": {"sequence": [{"operation": _OPERATION}]}}
_TRANSFORM: Rule = {
    "name": WORD,
    "type": one_of("DecodeImage", "ConvertRGB", "Resize", "Rescale", "Normalize", "Permute3D", "PatchImage"),
    "attrs": {str: (WHOLE, NUMBER, [NUMBER], one_of("RGB"))},
}
_PICTURES: Rule = {"processor": {"name": WORD, "transforms": [{"operation": _TRANSFORM}]}}


def check_config(path: Path) -> None:
    """InputError unless every key and value of a genai_config.json, or of an overlay of it, is on the list."""
    check(read(path), _CONFIG, path.name, path)


def check_audio(path: Path) -> None:
    """InputError unless an audio_processor_config.json names only known operations."""
    check(read(path), _AUDIO, path.name, path)


def check_vision(path: Path) -> None:
    """InputError unless a vision_processor.json names only known operations."""
    check(read(path), _PICTURES, path.name, path)


def is_config(name: str) -> bool:
    """Whether a file of this name is read by the runtime: genai_config.json, or an overlay such as
    genai_config.cuda.json."""
    return name.startswith("genai_config") and name.endswith(".json")
