"""Whisper with other numbers of layers or heads in its decoder, as large-v3-turbo and distilled ones have them.

The builder (0.18) computes the keys and values of the cross-attention in the encoder's graph, for as many layers
and heads as the encoder has itself. They are the decoder's.
"""

import sys
from collections.abc import Callable
from typing import Any

_OF_DECODER = ("make_inputs_and_outputs", "make_postprocessing_nodes")
_SIZES = ("num_layers", "num_attn_heads", "head_size")
_MENDED = "lora_export_mended"


def mend(builder: Any) -> None:
    """Give methods of the builder's encoder the sizes of the decoder. builder: its module, with WhisperModel."""
    encoder: Any = sys.modules[builder.WhisperModel.__module__].WhisperEncoder
    if hasattr(encoder, _MENDED):
        return
    plain = encoder.__init__

    def init(self: Any, config: Any, *others: Any) -> None:
        heads = config.decoder_attention_heads
        self.lora_export_sizes = (config.decoder_layers, heads, config.d_model // heads)
        plain(self, config, *others)

    encoder.__init__ = init
    for name in _OF_DECODER:
        setattr(encoder, name, _with_decoder_sizes(getattr(encoder, name)))
    setattr(encoder, _MENDED, True)


def _with_decoder_sizes(method: Callable[[Any], None]) -> Callable[[Any], None]:
    def run(self: Any) -> None:
        own = tuple(getattr(self, name) for name in _SIZES)
        for name, size in zip(_SIZES, self.lora_export_sizes, strict=True):
            setattr(self, name, size)
        try:
            method(self)
        finally:
            for name, size in zip(_SIZES, own, strict=True):
                setattr(self, name, size)

    return run
