"""LTX-Video and LTX-2 by the names of the original repository."""

from collections.abc import Iterator

from lora_export.adapters.diffusion.names.tables import Base, Spelling, renamed

CLASSES = frozenset({"LTXVideoTransformer3DModel", "LTX2VideoTransformer3DModel"})
_FIRST = {
    "proj_in": "patchify_proj",
    "audio_proj_in": "audio_patchify_proj",
    "time_embed": "adaln_single",
    "audio_time_embed": "audio_adaln_single",
    "prompt_adaln": "prompt_adaln_single",
    "audio_prompt_adaln": "audio_prompt_adaln_single",
    "av_cross_attn_video_scale_shift": "av_ca_video_scale_shift_adaln_single",
    "av_cross_attn_video_a2v_gate": "av_ca_a2v_gate_adaln_single",
    "av_cross_attn_audio_scale_shift": "av_ca_audio_scale_shift_adaln_single",
    "av_cross_attn_audio_v2a_gate": "av_ca_v2a_gate_adaln_single",
}
_LAST = {
    "norm_q": "q_norm",
    "norm_k": "k_norm",
    "video_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_video",
    "audio_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_audio",
}


def spellings(base: Base) -> Iterator[Spelling]:
    def rename(name: str) -> str:
        first, *rest = name.split(".")
        words = [_FIRST.get(first, first), *rest]
        words[-1] = _LAST.get(words[-1], words[-1])
        return ".".join(words)

    return renamed(base, rename)
