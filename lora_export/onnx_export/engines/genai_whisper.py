"""Whisper with another number of layers in its decoder, as large-v3-turbo and distilled ones have it.

The builder (0.18) computes the keys and values of the cross-attention in the encoder's graph, for as many layers as
the encoder has itself. They are the decoder's.
"""

import sys
from collections.abc import Callable
from typing import Any

_OF_DECODER = ("make_inputs_and_outputs", "make_postprocessing_nodes")
_MENDED = "lora_export_mended"


def mend(builder: Any) -> None:
    """Give methods of the builder's encoder the decoder's layers. builder: its module, with WhisperModel."""
    encoder: Any = sys.modules[builder.WhisperModel.__module__].WhisperEncoder
    if hasattr(encoder, _MENDED):
        return
    plain = encoder.__init__

    def init(self: Any, config: Any, *others: Any) -> None:
        self.lora_export_layers = config.decoder_layers
        plain(self, config, *others)

    encoder.__init__ = init
    for name in _OF_DECODER:
        setattr(encoder, name, _for_decoder(getattr(encoder, name)))
    setattr(encoder, _MENDED, True)


def _for_decoder(method: Callable[[Any], None]) -> Callable[[Any], None]:
    def run(self: Any) -> None:
        own, self.num_layers = self.num_layers, self.lora_export_layers
        try:
            method(self)
        finally:
            self.num_layers = own

    return run
