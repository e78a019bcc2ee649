"""What onnxruntime-genai's model builder (0.18) gets wrong, or leaves out, put right in its classes.

Each function changes one class, and says what would be wrong without it. `genai_process` undoes all of them after a
request.
"""

from typing import Any

from lora_export.onnx_export.engines import genai_rope


def mend(builder: Any) -> None:
    """builder: the module whose names are the builder's classes."""
    rename_settings(builder.Model)
    genai_rope.take_tables_of_the_model(builder.Model)
    genai_rope.compute_tables_that_follow_the_length(builder.Model)
    genai_rope.rotate_outside_where_attention_cannot(builder.Model)
    genai_rope.tables_by_layer_type(builder.Gemma3Model)
    genai_rope.drop_own_scaling(builder.Phi3MiniLongRoPEModel, builder.GPTOSSModel)
    scale_embeddings_exactly(builder.GemmaModel)
    subtract_mean(builder.OLMoModel)
    clip_projections(builder.OLMoModel)
    normalize_heads(builder.PhiModel)
    leave_layers_unrotated(builder.SmolLM3Model)
    read_windows(builder.GPTOSSModel)


def rename_settings(model: Any) -> None:
    """Provide settings under the names that the builder looks for.

    Phi and Nemotron have their own names for the normalization's epsilon, and OLMo has it in its code: the builder
    would use another value. Mistral and Phi-3 do not list their layers' windows; Gemma reads `hidden_act`, whatever
    `hidden_activation` says; and transformers 5 keeps Gemma 3's rotary settings by layer type.
    """
    plain = model.make_config_init

    def make_config_init(self: Any, config: Any) -> None:
        rope = getattr(config, "rope_parameters", None)
        if isinstance(rope, dict) and "rope_theta" in rope.get("sliding_attention", {}):
            config.rope_local_base_freq = rope["sliding_attention"]["rope_theta"]
            config.rope_parameters = dict(rope["full_attention"])
        if not hasattr(config, "rms_norm_eps"):
            named = (getattr(config, n, None) for n in ("layer_norm_eps", "norm_eps", "layer_norm_epsilon"))
            config.rms_norm_eps = next((e for e in named if e is not None), 1e-5)
        windowed = "sliding_window" in type(config).__dataclass_fields__  # elsewhere it is a stray entry
        if windowed and config.sliding_window and getattr(config, "layer_types", None) is None:
            config.layer_types = ["sliding_attention"] * config.num_hidden_layers
        if config.model_type == "gemma":
            config.hidden_activation = config.hidden_act
        plain(self, config)

    model.make_config_init = make_config_init


def scale_embeddings_exactly(model: Any) -> None:
    """Gemma multiplies embeddings by √hidden_size; the builder rounds it to two decimals."""
    plain = model.__init__

    def __init__(self: Any, config: Any, *rest: Any) -> None:
        plain(self, config, *rest)
        self.embed_attrs["scale"] = float(self.hidden_size) ** 0.5

    model.__init__ = __init__


def subtract_mean(model: Any) -> None:
    """OLMo's normalization subtracts the mean (it has no weights); the builder writes one that does not."""
    plain = model.make_layernorm

    def make_layernorm(self: Any, layer: int, norm: Any, skip: bool, simple: bool, location: str) -> None:
        plain(self, layer, norm, skip, False, location)

    model.make_layernorm = make_layernorm


def clip_projections(model: Any) -> None:
    """OLMo's `clip_qkv` bounds queries, keys and values; the builder ignores it."""
    plain = model.make_attention_input_proj

    def make_attention_input_proj(self: Any, layer: int, attention: Any, root_input: str, **how: Any) -> None:
        for name in ("q_path", "k_path", "v_path"):
            self.attention_attrs[name] = ""  # packed projections leave the last two as they were
        plain(self, layer, attention, root_input, **how)
        bound = self.unchanged_config.clip_qkv
        for name in ("q_path", "k_path", "v_path") if bound is not None else ():
            if path := self.attention_attrs[name]:
                node = f"/model/layers.{layer}/attn/{name[0]}_clip/Clip"
                limits = [f"/model/constants/{self.to_str_dtype(self.io_dtype)}/{n}" for n in (-bound, bound)]
                self.make_clip(node, [path, *limits], self.io_dtype, self.values[path].shape)
                self.attention_attrs[name] = f"{node}/output_0"

    model.make_attention_input_proj = make_attention_input_proj


def normalize_heads(model: Any) -> None:
    """Phi's `qk_layernorm` normalizes heads, with a mean and a bias; the builder ignores it."""
    plain_init, plain_norm = model.make_attention_init, model.make_qk_norm

    def make_attention_init(self: Any, config: Any) -> None:
        self.attention_attrs["q_norm"] = self.attention_attrs["k_norm"] = bool(config.qk_layernorm)
        plain_init(self, config)

    def make_qk_norm(self: Any, layer: int, attention: Any) -> None:
        attention.q_norm, attention.k_norm = attention.q_layernorm, attention.k_layernorm
        plain_norm(self, layer, attention)
        for name in ("q", "k"):
            of = f"/model/layers.{layer}/attn/{name}_norm/SimplifiedLayerNormalization"
            node = next(n for n in self.model.graph if n.name == of)
            bias = f"model.layers.{layer}.attn.{name}_norm.layernorm.bias"
            self.make_initializer(getattr(attention, f"{name}_layernorm").bias, bias, to=node.inputs[1].dtype)
            node.op_type = "LayerNormalization"
            node.resize_inputs(3)
            node.replace_input_with(2, self.make_value(bias))

    model.make_attention_init, model.make_qk_norm = make_attention_init, make_qk_norm
    model.is_fused_qk_norm_gqa_supported = lambda self: False  # what is fused has no mean and no bias


def leave_layers_unrotated(model: Any) -> None:
    """SmolLM3 does not rotate every fourth layer; the builder rotates it with an operator that lacks an input."""
    plain = model.make_attention

    def make_attention(self: Any, layer: int, attention: Any, root_input: str, **how: Any) -> None:
        rotates = bool(self.unchanged_config.no_rope_layers[layer])
        inside, all_layers = self.attention_attrs["use_rope_in_attn"], self.no_rope_layers
        self.attention_attrs["rope"] = rotates
        self.no_rope_layers = {layer: inside and rotates}  # from which `plain` sets what is inside of attention
        plain(self, layer, attention, root_input, **how)
        self.attention_attrs["rope"], self.no_rope_layers = True, all_layers

    model.make_attention = make_attention


def read_windows(model: Any) -> None:
    """gpt-oss lists its layers' windows; the builder takes every other layer."""
    plain = model.__init__

    def __init__(self: Any, config: Any, *rest: Any) -> None:
        plain(self, config, *rest)
        del self.is_local

    model.__init__ = __init__
