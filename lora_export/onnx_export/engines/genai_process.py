"""Run by genai.py in a process of its own: onnxruntime-genai's model builder on one request.

The builder usually puts values into its graph. Here it gets parameters that record which checkpoint tensors they
are made of, and the graph is written with a map of them. An unmerged graph (`adapter`) is entirely the builder's
own, including the values.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEAD = "/lm_head/MatMul"


def main(request: dict[str, Any]) -> None:
    from onnxruntime_genai.models import builder

    with _restored(builder.Model, builder.OLMoModel):
        _build(builder, request)


@contextlib.contextmanager
def _restored(*classes: type) -> Iterator[None]:
    """Undo what is changed of these classes: the next request starts from the builder's own."""
    before = [dict(vars(cls)) for cls in classes]
    try:
        yield
    finally:
        for cls, own in zip(classes, before, strict=True):
            for name in [*vars(cls)]:
                if name not in own:
                    delattr(cls, name)
                elif vars(cls)[name] is not own[name]:
                    setattr(cls, name, own[name])


def _build(builder: Any, request: dict[str, Any]) -> None:
    precision, provider = request["precision"], request["provider"]
    if (precision, provider) == ("fp32", "cuda"):
        _avoid_packed_attention(builder.Model)
    _own_commit(builder.Model)
    _rename_settings(builder.Model)
    _subtract_mean(builder.OLMoModel)
    _share_head(builder.Model)
    described = _RecordingBuilder(builder.Model) if request["described"] else None
    _number_cache_sizes(builder.Model)
    options = ["hf_remote=false", "hf_token=false", *_options(request)]
    # The builder's fp16 graph for the CPU has no GroupQueryAttention (six times the nodes) and fails on a second
    # token; ONNX Runtime's CPU provider runs the graph for CUDA.
    target = "cuda" if precision == "fp16" else provider
    common = ("", request["model"], request["output"], precision, target, request["cache"])
    builder.create_model(*common, **builder.parse_extra_options(*common, options))
    if described is not None:
        described.save(Path(request["output"]), request["quantized"])


def _rename_settings(model: Any) -> None:
    """Provide settings under the names that the builder looks for.

    transformers 5 keeps the two rotary settings of Gemma 3 by layer type. Phi and Nemotron have their own names for
    the normalization's epsilon, and OLMo has it in its code: the builder would use another value.
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
        plain(self, config)

    model.make_config_init = make_config_init


def _subtract_mean(model: Any) -> None:
    """OLMo's normalization subtracts the mean (it has no weights); the builder (0.18) writes one that does not."""
    plain = model.make_layernorm

    def make_layernorm(self: Any, layer: int, norm: Any, skip: bool, simple: bool, location: str) -> None:
        plain(self, layer, norm, skip, False, location)

    model.make_layernorm = make_layernorm


def _share_head(model: Any) -> None:
    """Tied embeddings read the head's quantized weight, by the names of its parts. The builder's own names (0.18)
    are wrong for the default quantizer with zero points or 8 bits."""
    from lora_export.onnx_export.quantize.blockwise import part_names
    from lora_export.onnx_export.weights.map import Quantization

    def make_names(self: Any) -> tuple[int, str, str, str]:
        bits = 8 if self.matmul_mixed_precision.get("last_matmul") == "int8" else self.quant_attrs["bits"]
        symmetric = self.quant_attrs["is_symmetric"]
        size, algorithm = self.quant_attrs["matmul_block_size"], self.quantization_algo
        how = Quantization(f"int{bits}", "packed", size, symmetric, algorithm)  # type: ignore[arg-type]
        names = part_names("lm_head.MatMul.weight", how)
        return bits, names["packed"], names["scales"], "" if symmetric else names["zero_points"]

    model.make_tied_quantized_embedding_input_names = make_names


def _number_cache_sizes(model: Any) -> None:
    """Give the cache's last dimension its number: transformers.js reads the builder's symbol as 0."""
    plain = model.save_model

    def save_model(self: Any, folder: str) -> None:
        graph = self.model.graph
        for value in (*graph.inputs, *graph.outputs):
            if value.shape is not None and len(value.shape) == 4 and str(value.shape[3]) == "kv_cache_dim":
                value.shape[3] = self.head_size
        plain(self, folder)

    model.save_model = save_model


def _options(request: dict[str, Any]) -> list[str]:
    from lora_export.onnx_export.quantize.settings import kept

    # The runtime would have to allocate a cache cut to the window; a growing one works in every runtime.
    options = ["windowed_kv_cache=false"]
    if how := request["quantized"]:
        options += [
            f"block_size={how['block_size']}",
            f"is_symmetric={str(how['symmetric']).lower()}",
            f"accuracy_level={how['accuracy_level']}",
            f"algo_config={how['algorithm']}",
        ]
        if kept(_HEAD, how["keep"]):  # tied embeddings then read it unquantized
            options.append(f"nodes_to_exclude={_HEAD},/model/embed_tokens/Gather")
        elif kept(_HEAD, how["eight_bits"]):
            options.append("matmul_mixed_precision=last_matmul:int8")
    if request["provider"] == "cpu":
        options.append("fuse_qk_norm_gqa=false")  # inputs of a CUDA kernel
    if request["adapter"]:
        options.append(f"adapter_path={request['adapter']}")
    return options


def _avoid_packed_attention(model: Any) -> None:
    """fp32 for CUDA: the builder's packed Attention lacks the cache outputs that it declares (0.18).

    Without it the builder writes MultiHeadAttention, which has an fp32 kernel on CUDA; GroupQueryAttention does
    not.
    """
    model.is_packed_attn_supported = lambda self: False


# --- weights that are described ----------------------------------------------------------------------------


class _RecordingBuilder:
    """Gives the builder recording parameters, and keeps its graphs until `save` writes them with their map."""

    def __init__(self, builder: Any) -> None:
        self._recipes: dict[int, dict[str, Any]] = {}  # by the builder of each graph: Whisper has two
        self._builders: list[Any] = []
        self._make_initializer = builder.make_initializer
        builder.load_weights = lambda of, folder: self._load(Path(folder))
        builder.make_initializer = lambda of, tensor, /, name, **how: self._make(of, tensor, name, **how)
        builder.save_model = lambda of, folder: self._builders.append(of)

    @staticmethod
    def _load(folder: Path) -> Any:
        import transformers

        from lora_export.onnx_export.engines.model_without_weights import load_without_weights, refuse_missing
        from lora_export.onnx_export.engines.recording_tensor import describe

        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        model = load_without_weights(getattr(transformers, config.architectures[0]), folder)
        refuse_missing(model)
        describe(model)
        return model.model

    def _make(self, builder: Any, tensor: Any, name: str, *, to: Any = None, raw: bool = False) -> None:
        import torch

        from lora_export.onnx_export.engines.recording_tensor import RecordingTensor, recipe_of

        if isinstance(tensor, RecordingTensor):
            recipe = recipe_of(tensor, name)
            self._recipes.setdefault(id(builder), {})[name] = recipe
            if recipe.pieces:
                tensor, to = _placeholder(tensor, name, to), None
            else:
                tensor = tensor.as_subclass(torch.Tensor)
        self._make_initializer(builder, tensor, name, to=to, raw=raw)

    def save(self, folder: Path, quantized: dict[str, Any] | None) -> None:
        from lora_export.onnx_export.graphs import files as graph_files
        from lora_export.onnx_export.quantize.blockwise import quantize_graph
        from lora_export.onnx_export.quantize.settings import Blockwise
        from lora_export.onnx_export.weights.map import Recipe, Weight

        graphs, weights, constants, data_files = {}, [], {}, {}
        for builder in self._builders:
            file, model, recipes = builder.filename, builder.model, self._recipes[id(builder)]
            data = data_files[file] = f"{file}.data"
            model.graph.sort()
            builder.stamp_build_metadata(model)
            own = []
            for name, value in model.graph.initializers.items():
                tensor = value.const_value
                if name in recipes or tensor.nbytes >= graph_files.INLINE:
                    shape, recipe = tuple(tensor.shape.numpy()), recipes.get(name) or Recipe()
                    own.append(Weight(name, data, graph_files.map_type(tensor.dtype), shape, recipe))
                if name not in recipes or not recipes[name].pieces:
                    constants[data, name] = tensor.numpy()
            weights += quantize_graph(model, own, Blockwise(**quantized)) if quantized else own
            graphs[file] = model
        graph_files.save(folder, graphs, weights, constants, data_files)


def _own_commit(builder: Any) -> None:
    """The builder would ask git about the folder it is installed in, which may be somebody else's repository."""
    import onnxruntime_genai

    builder.get_genai_commit = classmethod(lambda cls: getattr(onnxruntime_genai, "__commit__", None))


def _placeholder(tensor: Any, name: str, to: Any) -> Any:
    """A tensor with only a type and a shape."""
    from onnx_ir.tensor_adapters import from_torch_dtype

    from lora_export.onnx_export.graphs.files import without_numbers

    return without_numbers(name, to or from_torch_dtype(tensor.dtype), tensor.shape)
