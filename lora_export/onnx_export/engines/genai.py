"""Exports decoders with onnxruntime-genai's builder: fused attention, a KV cache, tied embeddings stored once."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

from lora_export.checkpoint.companions import has_tokenizer
from lora_export.choices import Precision
from lora_export.errors import AdapterError, ExportError
from lora_export.onnx_export.engines import companions
from lora_export.onnx_export.engines.protocol import Engine, ExportJob, Made, architecture_of
from lora_export.onnx_export.graphs import checks
from lora_export.storage import sealed

# The text decoders of builder.py's create_model. Left out: its multimodal classes, those that are not in
# transformers (ChatGLM, InternLM2, Phi3Small) and need the model's own code, and PhiMoE, which it writes only in
# int4 for CUDA.
_ARCHITECTURES = frozenset(
    f"{family}ForCausalLM"
    for family in (
        "Ernie4_5", "Gemma", "Gemma2", "Gemma3", "GptOss", "Granite", "GraniteMoeHybrid", "HunYuanDenseV1", "Lfm2",
        "Lfm2Moe", "Llama", "Mistral", "Nemotron", "Olmo", "Phi", "Phi3", "Qwen2", "Qwen3", "SmolLM3",
    )
)  # fmt: skip
_WHISPER = frozenset({"WhisperForConditionalGeneration"})
_PROVIDERS = ("cpu", "cuda")
_TEXT = Made("decoder", "text-generation-with-past", ("model.onnx",), True)
_SPEECH = Made("seq2seq", "automatic-speech-recognition-with-past", ("encoder.onnx", "decoder.onnx"), True)


class GenaiEngine(Engine):
    name: ClassVar[str] = "genai"
    architectures: ClassVar[frozenset[str]] = _ARCHITECTURES | _WHISPER
    fp16_int4: ClassVar[bool] = True

    def check(self, job: ExportJob) -> None:
        """Refuse what the builder would do wrong, or what the provider could not run."""
        self.check_precision(job.precision, job.provider)
        if not has_tokenizer(job.model):
            raise ExportError(
                "the folder has no tokenizer, which onnxruntime-genai needs for a decoder",
                where=job.model,
                expected="tokenizer.json, tokenizer.model, or vocab.json with merges.txt",
                next_step="copy the tokenizer files of the base model into the folder",
            )
        _refuse_head_size(job.config)
        _refuse_ambiguous_head(job.config)
        _refuse_left_out(job.config)
        _refuse_unequal_heads(job.config)
        if job.adapter is not None:
            _check_adapter(job.adapter)

    def check_precision(self, precision: Precision, provider: str) -> None:
        if provider not in _PROVIDERS:
            raise ExportError(
                f"a decoder cannot be exported for the provider {provider!r}",
                expected=" or ".join(_PROVIDERS),
            )
        if precision == "nf4":
            raise ExportError(
                "the genai engine does not export nf4: its graphs are quantized as int4 and int8",
                expected="int4 for a decoder",
                next_step="--precision int4",
            )
        if precision == "bf16" and provider == "cpu":
            raise ExportError(
                "bf16 does not run on the CPU: ONNX Runtime has no bfloat16 MatMul there",
                expected="fp32, fp16, int8 or int4",
                next_step="--precision fp32, or --provider cuda",
            )

    def generates(self, config: Mapping[str, Any]) -> bool:
        return True

    def run(self, job: ExportJob) -> Made:
        described = job.adapter is None
        request = {
            "described": described,
            "quantized": asdict(job.quantized) if job.quantized else None,
            "model": str(job.model.resolve()),
            "output": str(job.output.resolve()),
            "precision": job.precision,
            "provider": job.provider,
            "adapter": str(job.adapter.resolve()) if job.adapter else None,
        }
        job.worker.run("lora_export.onnx_export.engines.genai_process", request, engine=self.name)
        _mend_genai_config(job)
        made = _SPEECH if architecture_of(job.config) in _WHISPER else _TEXT
        if job.adapter is not None:
            _check_adapter_arrived(job)
        return replace(made, described=described)

    def mixes_bits(self, config: Mapping[str, Any]) -> bool:
        return not config.get("is_encoder_decoder")

    def accompany(self, model: Path, output: Path) -> None:
        companions.copy(model, output)
        settings = sealed.read_json(output / "genai_config.json")["model"]
        companions.follow_ends(output)
        companions.bound_model_max_length(output, int(settings["context_length"]))


ENGINE = GenaiEngine()


def _refuse_head_size(config: Mapping[str, Any]) -> None:
    """ONNX Runtime's GroupQueryAttention fails at run time unless head sizes are multiples of 8."""
    size = _sizes(config)["head size"]
    if size % 8:
        raise ExportError(
            f"the attention heads have size {size}, which ONNX Runtime's GroupQueryAttention cannot run",
            where="config.json",
            expected="a multiple of 8",
            next_step="use the merged folder with transformers, vLLM or TGI as it is: lora-export merge",
        )


def _refuse_unequal_heads(config: Mapping[str, Any]) -> None:
    """The builder's decoder of Whisper has as many heads as the encoder, whatever the configuration says."""
    heads = [config.get(f"{of}_attention_heads") for of in ("encoder", "decoder")]
    if heads[0] != heads[1]:
        raise ExportError(
            f"{heads[0]} attention heads in the encoder, {heads[1]} in the decoder; the builder takes one number",
            where="config.json",
            expected="as many heads in both",
            next_step="--engine dynamo",
        )


def _refuse_ambiguous_head(config: Mapping[str, Any]) -> None:
    """The builder silently takes every Linear with vocab_size outputs for the head."""
    for name, width in _sizes(config).items():
        if name != "head size" and width and width == config.get("vocab_size"):
            raise ExportError(
                f"vocab_size and {name} are both {width}: the builder would confuse a layer with the head",
                where="config.json",
                expected="a different vocabulary size",
                next_step="pad the vocabulary (resize_token_embeddings), and merge again",
            )


def _refuse_left_out(config: Mapping[str, Any]) -> None:
    """What the builder (0.18) leaves out of its graphs without a word, or stops at."""
    found = next((words for words, there in _left_out(config) if there), None)
    if found is not None:
        raise ExportError(
            f"the builder of onnxruntime-genai does not write {found}",
            where="config.json",
            expected="layers that it knows",
            next_step="--engine dynamo, or no --engine",
        )


def _left_out(config: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    kinds = set(config.get("layer_types") or config.get("layers_block_type") or ())
    architecture = architecture_of(config)
    if architecture == "GraniteMoeHybridForCausalLM":
        yield "state space layers", bool(kinds - {"attention", "full_attention"}) or not kinds
        yield "the experts of Granite", bool(config.get("num_local_experts"))
        yield "attention without positions", config.get("position_embedding_type") != "rope"
    if architecture == "Lfm2MoeForCausalLM":
        yield "experts whose weights do not add up to one", not config.get("norm_topk_prob", True)


def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """The widths of a model's layers by name; 0 for what the configuration does not contain."""

    def first(*names: str) -> int:
        return next((int(config[n]) for n in names if isinstance(config.get(n), int)), 0)

    heads, hidden = first("num_attention_heads", "decoder_attention_heads"), first("hidden_size", "d_model")
    size = first("head_dim") or (hidden // heads if heads else 0)
    return {
        "head size": size,
        "hidden_size": hidden,
        "intermediate_size": first("intermediate_size", "decoder_ffn_dim"),
        "num_attention_heads × head_dim": heads * size,
        "num_key_value_heads × head_dim": (first("num_key_value_heads") or heads) * size,
    }


def _mend_genai_config(job: ExportJob) -> None:
    """Remove CUDA's options from genai_config.json of a graph for the CPU."""
    if job.provider != "cpu":
        return
    path = job.output / "genai_config.json"
    config = sealed.read_json(path)
    for part in config["model"].values():
        if isinstance(part, dict) and "session_options" in part:
            part["session_options"]["provider_options"] = []
    sealed.write_json(path, config)


# --- the unmerged graph ------------------------------------------------------------------------------------


def _check_adapter(adapter: Path) -> None:
    """The builder reads plain LoRA on linear layers; it would drop the rest, or export it wrongly."""
    config = sealed.read_json(adapter / "adapter_config.json")
    if not (adapter / "adapter_model.safetensors").is_file():
        raise AdapterError(
            "the adapter has no adapter_model.safetensors",
            where=adapter,
            expected="safetensors; a .bin file is a pickle, which can run code",
        )
    unsupported = ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias", "alora_invocation_tokens")
    odd = [key for key in unsupported if config.get(key)]
    if config.get("peft_type") != "LORA":
        odd.insert(0, f"peft_type {config.get('peft_type')}")
    if odd:
        raise ExportError(
            f"the builder cannot keep this adapter unmerged: {', '.join(odd)}",
            where=adapter / "adapter_config.json",
            expected="plain LoRA on linear layers",
            next_step="benchmark base against merged without an unmerged graph",
        )


def _check_adapter_arrived(job: ExportJob) -> None:
    """Every lora_A of the adapter must be an initializer; otherwise the graph is not the unmerged model."""
    from safetensors import safe_open

    assert job.adapter is not None
    with safe_open(job.adapter / "adapter_model.safetensors", framework="np") as tensors:
        wanted = sum(".lora_A." in name for name in tensors.keys())  # noqa: SIM118 - not a mapping
    weights = checks.open_model(job.output / "model.onnx").graph.initializers
    modules = {name.split(".lora_A.")[0] for name, value in weights.items() if ".lora_A." in name and value.uses()}
    if len(modules) != wanted:
        raise ExportError(
            f"the builder put {len(modules)} of the adapter's {wanted} updates into the graph",
            where=job.adapter,
            expected="all of them: LoRA on the attention and MLP projections only",
            next_step="benchmark base against merged without an unmerged graph",
        )
