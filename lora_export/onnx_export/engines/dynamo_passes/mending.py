"""Undoes what a fusion did to a graph and ONNX Runtime does not run."""

import onnx_ir as ir

from lora_export.onnx_export.engines.dynamo_passes.traced_graph import TracedGraph

_SIDES = ((0, "transBatchA"), (1, "transBatchB"))


def split_batch_transposes(graph: TracedGraph) -> None:
    """Give a FusedMatMul its batch transpose as a node again where its inputs have different ranks.

    onnxscript fuses `transpose(x) @ weight` for any rank; the operator refuses a batch transpose beside a matrix.
    """
    for node in graph.nodes("FusedMatMul"):
        ranks = {None if v is None or v.shape is None else len(v.shape) for v in node.inputs}
        if len(ranks) == 1 and None not in ranks:
            continue
        for side, name in _SIDES:
            value, flag = node.inputs[side], node.attributes.get(name)
            if flag is None or not flag.as_int() or value is None or value.shape is None:
                continue
            axes = range(len(value.shape))
            perm = [*axes[1:-1], 0, axes[-1]]
            turned = ir.node("Transpose", [value], {"perm": perm}, num_outputs=1)
            turned.outputs[0].dtype = value.dtype
            turned.outputs[0].shape = ir.Shape([value.shape[i] for i in perm])
            graph.model.graph.insert_before(node, turned)
            node.replace_input_with(side, turned.outputs[0])
            node.attributes[name] = ir.AttrInt64(name, 0)
