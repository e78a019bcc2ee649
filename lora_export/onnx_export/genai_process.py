"""Run by genai.py as a process: onnxruntime-genai's model builder on one request, given as JSON on stdin."""

import json
import sys
from typing import Any


def main() -> None:
    request = json.load(sys.stdin)
    from onnxruntime_genai.models import builder

    precision, provider = request["precision"], request["provider"]
    if (precision, provider) == ("fp32", "cuda"):
        _avoid_packed_attention(builder.Model)
    options = ["hf_remote=false", "hf_token=false", *_options(request)]
    # The builder's fp16 graph for the CPU does without GroupQueryAttention (six times the nodes) and fails
    # on a second token; ONNX Runtime's CPU provider runs the one for CUDA.
    target = "cuda" if precision == "fp16" else provider
    common = ("", request["model"], request["output"], precision, target, request["cache"])
    builder.create_model(*common, **builder.parse_extra_options(*common, options))


def _options(request: dict[str, Any]) -> list[str]:
    options = []
    if request["provider"] == "cpu":
        options.append("fuse_qk_norm_gqa=false")  # a CUDA kernel's inputs
    if request["adapter"]:
        options.append(f"adapter_path={request['adapter']}")
    return options


def _avoid_packed_attention(model: Any) -> None:
    """fp32 for CUDA: the builder's packed Attention leaves out the cache outputs it declares (0.18).

    Without it the builder writes MultiHeadAttention, which has an fp32 kernel on CUDA; GroupQueryAttention
    has none there.
    """
    model.is_packed_attn_supported = lambda self: False


if __name__ == "__main__":
    main()
