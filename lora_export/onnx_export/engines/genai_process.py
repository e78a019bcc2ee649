"""Run by genai.py in a process of its own: onnxruntime-genai's model builder on one request.

The builder usually puts values into its graph. Here it gets parameters that record which checkpoint tensors they
are made of, and the graph is written with a map of them. An unmerged graph (`adapter`) is entirely the builder's
own, including the values.
"""

import contextlib
import functools
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_export.onnx_export.engines import genai_whisper
from lora_export.onnx_export.engines.genai_experts import keep_stored_experts
from lora_export.onnx_export.engines.genai_mending import mend
from lora_export.onnx_export.engines.genai_padding import turn_rows

_HEAD, _HEAD_WEIGHT = "/lm_head/MatMul", "lm_head.MatMul.weight"
_EMBEDDING = "/model/embed_tokens/Gather"


def main(request: dict[str, Any]) -> None:
    from onnxruntime_genai.models import builder

    classes = [c for c in vars(builder).values() if isinstance(c, type) and issubclass(c, builder.Model)]
    with _restored(*classes), _one_tokenizer(builder):
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


@contextlib.contextmanager
def _one_tokenizer(builder: Any) -> Iterator[None]:
    """Read the tokenizer once: the builder does it three times, a second for a large vocabulary."""
    modules, plain = [builder, sys.modules[builder.Model.__module__]], builder.AutoTokenizer

    class Once:
        from_pretrained = staticmethod(functools.cache(plain.from_pretrained))

    try:
        for module in modules:
            module.AutoTokenizer = Once
        yield
    finally:
        for module in modules:
            module.AutoTokenizer = plain


def _build(builder: Any, request: dict[str, Any]) -> None:
    precision, provider = request["precision"], request["provider"]
    if (precision, provider) == ("fp32", "cuda"):
        _avoid_packed_attention(builder.Model)
    _own_commit(builder.Model)
    genai_whisper.mend(builder)
    mend(builder)
    _share_head(builder.Model)
    if request["described"]:
        keep_stored_experts(builder)
    described = _RecordingBuilder(builder.Model, Path(request["model"])) if request["described"] else None
    _finish_graphs(builder.Model)
    options = ["hf_remote=false", "hf_token=false", *_options(request, described.tables if described else {})]
    # The builder's fp16 graph for the CPU has no GroupQueryAttention (six times the nodes) and fails on a second
    # token; ONNX Runtime's CPU provider runs the graph for CUDA.
    target = "cuda" if precision == "fp16" else provider
    common = ("", request["model"], request["output"], precision, target, request["cache"])
    builder.create_model(*common, **builder.parse_extra_options(*common, options))
    if described is not None:
        described.save(Path(request["output"]), request["quantized"])


def _share_head(model: Any) -> None:
    """Tied embeddings read the head's quantized weight, in 8 bits too, by the names of its parts.

    The builder's own names (0.18) are wrong for the default quantizer with zero points or 8 bits, and it shares
    4-bit weights alone.
    """
    from lora_export.onnx_export.quantize.blockwise import part_names
    from lora_export.onnx_export.quantize.settings import Blockwise

    plain = model.make_tied_embeddings_init

    def make_init(self: Any, config: Any) -> None:
        plain(self, config)
        shared = self.tied_quantized_embeddings or self.tied_unquantized_embeddings
        if self.extra_options.get("shared_embeddings") and not shared and _EMBEDDING not in _excluded(self):
            self.tied_quantized_embeddings = self.is_lm_head_quantized()

    def table_of(self: Any) -> tuple[int, Blockwise]:
        bits = 8 if self.matmul_mixed_precision.get("last_matmul") == "int8" else self.quant_attrs["bits"]
        size, algorithm = self.quant_attrs["matmul_block_size"], self.quantization_algo
        how = Blockwise(f"int{bits}", size, self.quant_attrs["is_symmetric"], algorithm)  # type: ignore[arg-type]
        return bits, how.of_table(self.hidden_size, shared=True)

    def make_names(self: Any) -> tuple[int, str, str, str]:
        bits, how = table_of(self)
        names = part_names(_HEAD_WEIGHT, how.settings)
        return bits, names["packed"], names["scales"], "" if how.symmetric else names["zero_points"]

    lookup = model.make_embedding_lookup

    def make_lookup(self: Any, *given: Any) -> Any:
        plain_attributes = self.quant_attrs
        _, how = table_of(self)
        self.quant_attrs = plain_attributes | {"matmul_block_size": how.block_size}
        try:
            return lookup(self, *given)
        finally:
            self.quant_attrs = plain_attributes

    model.make_tied_embeddings_init = make_init
    model.make_tied_quantized_embedding_input_names = make_names
    model.make_embedding_lookup = make_lookup


def _excluded(model: Any) -> Any:
    return model.quant_attrs["nodes_to_exclude"]


def _finish_graphs(model: Any) -> None:
    """Take rows that are padded on the left, and give the cache's last dimension its number: transformers.js reads
    the builder's symbol as 0."""
    plain = model.save_model

    def save_model(self: Any, folder: str) -> None:
        graph = self.model.graph
        for value in (*graph.inputs, *graph.outputs):
            if value.shape is not None and len(value.shape) == 4 and str(value.shape[3]) == "kv_cache_dim":
                value.shape[3] = self.head_size
        turn_rows(graph)
        plain(self, folder)

    model.save_model = save_model


def _options(request: dict[str, Any], tables: Mapping[str, Collection[str]]) -> list[str]:
    """tables: the checkpoint tensors of the head and of the embedding, if they are known."""
    from lora_export.onnx_export.quantize.settings import GPTQ, chosen

    nodes: dict[str, Collection[str]] = {_HEAD: (), _EMBEDDING: (), **tables}
    # The runtime would have to allocate a cache cut to the window; a growing one works in every runtime.
    options = ["windowed_kv_cache=false"]
    if how := request["quantized"]:
        algorithm = "default" if how["algorithm"] == GPTQ else how["algorithm"]  # the graph is the same
        options += [
            f"block_size={how['block_size']}",
            f"is_symmetric={str(how['symmetric']).lower()}",
            f"accuracy_level={how['accuracy_level']}",
            f"algo_config={algorithm}",
        ]
        kept = chosen(nodes, how["keep"])
        excluded = [_HEAD] if _HEAD in kept else []
        if kept or not how["embeddings"]:
            excluded.append(_EMBEDDING)  # tied embeddings of an unquantized head read it unquantized
        if excluded:
            options.append(f"nodes_to_exclude={','.join(excluded)}")
        if _HEAD not in excluded and _HEAD in chosen(nodes, how["eight_bits"]):
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

    def __init__(self, builder: Any, folder: Path) -> None:
        self._model = self._load(folder)
        self._recipes: dict[int, dict[str, Any]] = {}  # by the builder of each graph: Whisper has two
        self._builders: list[Any] = []
        self._make_initializer = builder.make_initializer
        builder.load_weights = lambda of, folder: self._model
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

    @property
    def tables(self) -> dict[str, frozenset[str]]:
        """Node → the checkpoint tensors of its weight, of the head and the embedding."""
        from lora_export.onnx_export.engines.recording_tensor import RecordingTensor, recipe_of

        modules = {_HEAD: self._model.get_output_embeddings(), _EMBEDDING: self._model.get_input_embeddings()}
        weights = {node: getattr(module, "weight", None) for node, module in modules.items()}
        return {
            node: frozenset(piece.tensor for piece in recipe_of(weight, node).pieces)
            for node, weight in weights.items()
            if isinstance(weight, RecordingTensor)
        }

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
        from lora_export.onnx_export.engines.genai_experts import quantize
        from lora_export.onnx_export.graphs import files as graph_files
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
            shared = [_HEAD_WEIGHT] if getattr(builder, "tied_quantized_embeddings", False) else []
            weights += quantize(model, own, Blockwise(**quantized), shared) if quantized else own
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
