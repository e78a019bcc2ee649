"""Decoders: text generation, and heads on them."""

from tests.export_matrix.models import Row

ROWS = (
    Row("LlamaForCausalLM"),
    Row("Qwen3MoeForCausalLM"),
    Row("LlamaForSequenceClassification"),
    Row("Qwen3ForCausalLM"),
    Row("Gemma3ForCausalLM"),
    Row("MixtralForCausalLM"),
    Row("GptOssForCausalLM"),
    Row("Lfm2ForCausalLM"),
    Row("GraniteMoeHybridForCausalLM"),
    Row("Olmo2ForCausalLM"),
    Row("Starcoder2ForCausalLM"),
    Row("StableLmForCausalLM"),
    Row("CohereForCausalLM"),
    Row("FalconForCausalLM"),
    Row("GPTJForCausalLM"),
    Row("GPTNeoForCausalLM"),
    Row("GPTBigCodeForCausalLM"),
    Row("GPT2LMHeadModel"),
    Row("GlmForCausalLM"),
    Row("Qwen3ForSequenceClassification"),
    Row("Qwen2ForTokenClassification"),
    Row("Qwen3Model"),
    Row("Gemma3TextModel"),
    Row("MistralModel"),
)
