"""Run by dynamo.py as a process: torch's dynamo exporter on one request, given as JSON on stdin."""

import inspect
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx
    import torch

OPSET = 20
SINGLE_FILE_LIMIT = 1_500_000_000  # bytes; protobuf ends at 2 GiB, and Optimum writes one file below that
DUMMY_BATCH, DUMMY_LENGTH = 2, 16  # neither may be 1: torch.export would take it for a constant


def main() -> None:
    request = json.load(sys.stdin)
    import onnx_ir

    model = onnx_ir.to_proto(_graph(Path(request["model"])))
    if request["precision"] == "fp16":
        model = _halve(model)
    _save(model, Path(request["output"]))


def _graph(folder: Path) -> Any:
    """The fused graph (onnx_ir.Model): ids and masks [batch, length] of int64 in, one tensor out."""
    import torch
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    model, output = _load(folder)
    inputs = _dummy_inputs(model)
    batch, length = torch.export.Dim("batch_size"), torch.export.Dim("sequence_length")
    program = torch.onnx.export(
        _one_output(model, tuple(inputs), output),
        tuple(inputs.values()),
        dynamo=True,
        opset_version=OPSET,
        input_names=list(inputs),
        output_names=[output],
        dynamic_shapes=(({0: batch, 1: length},) * len(inputs),),  # one entry: forward's only parameter
    )
    assert program is not None
    fused, _ = optimize_for_ort(program.model, clear_metadata=True)
    return fused


def _load(folder: Path) -> tuple["torch.nn.Module", str]:
    """The model in fp32, in evaluation mode, and the name of its output as Optimum has it."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    cls = getattr(transformers, config.architectures[0])
    model = cls.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
    return model, "last_hidden_state" if config.architectures[0].endswith("Model") else "logits"


def _dummy_inputs(model: Any) -> dict[str, "torch.Tensor"]:
    """Ids, mask and, where the model tells segments apart, token types; from Optimum's generator."""
    from optimum.utils import DummyTextInputGenerator, NormalizedConfigManager

    names = ["input_ids", "attention_mask"]
    takes_segments = "token_type_ids" in inspect.signature(model.forward).parameters
    if takes_segments and getattr(model.config, "type_vocab_size", 0) > 1:
        names.append("token_type_ids")
    normalized = NormalizedConfigManager.get_normalized_config_class(model.config.model_type)(model.config)
    generator = DummyTextInputGenerator(
        "feature-extraction", normalized, batch_size=DUMMY_BATCH, sequence_length=DUMMY_LENGTH
    )
    return {name: generator.generate(name, framework="pt") for name in names}


def _one_output(model: Any, names: tuple[str, ...], output: str) -> "torch.nn.Module":
    import torch

    class OneOutput(torch.nn.Module):
        """Takes the inputs by position and returns one tensor: poolers and hidden states stay outside."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *values: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.model(**dict(zip(names, values, strict=True)))[output]
            return result

    return OneOutput().eval()


def _halve(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """Weights and arithmetic in half precision; the output stays fp32, as Optimum leaves it."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    # onnx's shape inference does not know the fused operators
    halved: onnx.ModelProto = convert_float_to_float16(model, keep_io_types=True, disable_shape_infer=True)
    return halved


def _save(model: "onnx.ModelProto", path: Path) -> None:
    import onnx

    external = model.ByteSize() > SINGLE_FILE_LIMIT
    onnx.save(model, str(path), save_as_external_data=external, location=f"{path.name}_data" if external else None)


if __name__ == "__main__":
    main()
