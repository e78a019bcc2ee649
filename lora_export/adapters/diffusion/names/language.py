"""Language models as text encoders: their layers with and without the names of the models around them."""

from collections.abc import Iterator

from lora_export.adapters.diffusion.names.tables import Base, Spelling

CLASSES = frozenset(
    {
        "Gemma2Model",
        "Gemma2ForCausalLM",
        "Gemma3ForConditionalGeneration",
        "LlamaModel",
        "LlamaForCausalLM",
        "LlavaForConditionalGeneration",
        "Mistral3ForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3ForCausalLM",
        "Qwen3Model",
    }
)
_WRAPPERS = ("model.language_model.", "language_model.model.", "language_model.", "model.")


def spellings(base: Base) -> Iterator[Spelling]:
    """ComfyUI and sd-scripts hold the layers alone, transformers puts up to two names before them."""
    for name in base.modules:
        bare = next((name.removeprefix(w) for w in _WRAPPERS if name.startswith(w)), name)
        pieces = base.pieces(name)
        if pieces and bare.startswith(("layers.", "embed_tokens", "norm")):
            yield bare, pieces
            yield f"model.{bare}", pieces
