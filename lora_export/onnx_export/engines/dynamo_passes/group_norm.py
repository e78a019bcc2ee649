"""Group normalization as one operator of ONNX Runtime's CUDA provider, with the SiLU behind it.

torch's exporter writes InstanceNormalization, a product and a sum between reshapes, which no fusion takes. So the
operator is inserted while the model is traced, as attention is. It wants channels last; other providers have none.
"""

import contextlib
from typing import Any

import onnx_ir as ir
import torch

from lora_export.onnx_export.engines.dynamo_passes.traced_graph import MICROSOFT, TracedGraph, replace_uses

NAME = "GroupNorm"
_LAST, _FIRST = (0, 2, 3, 1), (0, 3, 1, 2)  # where channels go


def in_torch() -> contextlib.AbstractContextManager[Any]:
    """Inside, torch's own group_norm is the operator."""
    from lora_export.onnx_export.engines.trace_patches import Replaced

    return Replaced({torch.nn.functional.group_norm: _group_norm})


def _group_norm(
    states: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """(rows, channels, height, width) or (rows, channels, length) → the same shape."""
    if weight is None or bias is None or states.dim() not in (3, 4):
        return NotImplemented
    planes = states if states.dim() == 4 else states.unsqueeze(2)
    last = planes.permute(_LAST)
    result = torch.onnx.ops.symbolic(
        f"{MICROSOFT}::{NAME}",
        [last, weight, bias],
        {"epsilon": float(eps), "groups": int(num_groups), "activation": 0, "channels_last": 1},
        dtype=states.dtype,
        shape=last.shape,
        version=1,
    ).permute(_FIRST)
    return result if states.dim() == 4 else result.squeeze(2)


def finish(graph: TracedGraph) -> None:
    """Take the SiLU behind each operator into it, and keep its factors in fp32, as it reads them."""
    for node in graph.nodes(NAME):
        _take_silu(node)
        for value in node.inputs[1:]:
            if value is not None and value.dtype == ir.DataType.FLOAT16:
                _widen(value)


def _take_silu(node: ir.Node) -> None:
    """GroupNorm → Transpose → x · sigmoid(x), each read by nothing else."""
    value = node.outputs[0]
    while True:
        users = [user for user, _ in value.uses()]
        if len(users) != 1 or value.is_graph_output():
            return
        if users[0].op_type == "Transpose":
            value = users[0].outputs[0]
            continue
        silu = users[0]
        alpha = silu.attributes.get_float("alpha", 0.0)
        if silu.op_type == "QuickGelu" and alpha == 1.0 and not silu.outputs[0].is_graph_output():
            node.attributes["activation"] = ir.AttrInt64("activation", 1)
            replace_uses(silu.outputs[0], value)
            assert silu.graph is not None
            silu.graph.remove(silu, safe=True)
        return


def _widen(value: ir.Value) -> None:
    if all(user.op_type == NAME and index for user, index in value.uses()):
        tensor = value.const_value
        assert isinstance(tensor, ir.ExternalTensor)
        value.const_value = ir.ExternalTensor(
            "", 0, 0, ir.DataType.FLOAT, shape=tensor.shape, name=str(tensor.name)
        )
        value.dtype = ir.DataType.FLOAT
