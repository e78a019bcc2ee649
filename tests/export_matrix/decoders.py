"""Decoders: text generation, and heads on them."""

from tests.export_matrix.models import Row

HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
HALF = {"partial_rotary_factor": 0.5}
ROWS = (
    Row("LlamaForCausalLM"),
    Row("Qwen3MoeForCausalLM"),
    Row("LlamaForSequenceClassification", {"pad_token_id": 3}),
    Row("Qwen3ForCausalLM"),
    Row("Gemma3ForCausalLM"),
    Row("MixtralForCausalLM"),
    Row("GptOssForCausalLM"),
    Row("Lfm2ForCausalLM"),
    Row("GraniteMoeHybridForCausalLM", HYBRID),
    Row("Olmo2ForCausalLM"),
    Row("Starcoder2ForCausalLM"),
    Row("StableLmForCausalLM", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **HALF}}),
    Row("CohereForCausalLM"),
    Row("FalconForCausalLM"),
    Row("GPTJForCausalLM", {"rotary_dim": 8}),
    Row("GPTNeoForCausalLM"),
    Row("GPTBigCodeForCausalLM"),
    Row("GPT2LMHeadModel"),
    Row("GlmForCausalLM"),
    Row("Qwen3ForSequenceClassification", {"pad_token_id": 3}),
    Row("Qwen2ForTokenClassification"),
    Row("Qwen3Model"),
    Row("Gemma3TextModel"),
    Row("MistralModel"),
)
