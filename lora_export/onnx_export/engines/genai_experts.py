"""Mixtures of experts in the builder's graphs: one MoE node a layer, whose weights stay as the checkpoint has them.

The CPU's kernel wants the lines of gate and up projections to alternate, and each expert's matrix as (out, in). The
builder computes such weights, which no recipe describes. Here the graph orders the lines itself: from constants
only, so that ONNX Runtime does it once, when it loads the graph.
"""

from typing import Any


def keep_stored_experts(builder: Any) -> None:
    """builder: the module whose names are the builder's classes."""
    use_unquantized_operator(builder.Model)
    alternate_in_graph(builder.Model)
    turn_in_graph(builder.GPTOSSModel)


def use_unquantized_operator(model: Any) -> None:
    """The builder quantizes experts while it writes a graph, even one in fp32."""
    plain = model.make_moe_init

    def make_moe_init(self: Any) -> None:
        plain(self)
        self.moe_attrs["op_type"] = "MoE"

    model.make_moe_init = make_moe_init


def alternate_in_graph(model: Any) -> None:
    """[gate | up] of each expert to lines that alternate; the builder's biases of zeros are left out."""

    def make_interleaved_swiglu_moe_preprocessing(self: Any, layer: int, moe: Any) -> None:
        import torch

        names = self.make_moe_expert_names(layer)
        stored = moe.experts.gate_up_proj
        experts, lines, _ = stored.shape
        self.make_initializer(stored, f"{names['gate_up_weight']}.stored", to=self.io_dtype)
        apart, turned = f"{names['gate_up_weight']}.apart", f"{names['gate_up_weight']}.alternating"
        _node(self, "Reshape", [f"{names['gate_up_weight']}.stored", _sizes(experts, 2, lines // 2, -1)], apart)
        _node(self, "Transpose", [apart], turned, perm=[0, 2, 1, 3])
        _node(self, "Reshape", [turned, _sizes(experts, lines, -1)], names["gate_up_weight"])
        self.make_initializer(moe.experts.down_proj, names["down_weight"], to=self.io_dtype)
        self.make_initializer(torch.zeros(experts, lines), names["gate_up_bias"], to=self.io_dtype)
        self.make_initializer(torch.zeros(experts, self.hidden_size), names["down_bias"], to=self.io_dtype)

    model.make_interleaved_swiglu_moe_preprocessing = make_interleaved_swiglu_moe_preprocessing


def turn_in_graph(model: Any) -> None:
    """gpt-oss keeps matrices as (in, out), whose lines alternate already."""

    def make_moe_preprocessing(self: Any, layer: int, moe: Any, root_input: str) -> None:
        names = self.make_moe_expert_names(layer)
        for part in ("gate_up", "down"):
            stored, name = getattr(moe.experts, f"{part}_proj"), names[f"{part}_weight"]
            self.make_initializer(stored, f"{name}.stored", to=self.io_dtype)
            _node(self, "Transpose", [f"{name}.stored"], name, perm=[0, 2, 1])
            bias = getattr(moe.experts, f"{part}_proj_bias")
            self.make_initializer(bias, names[f"{part}_bias"], to=self.io_dtype)

    model.make_moe_preprocessing = make_moe_preprocessing


def _sizes(*sizes: int) -> str:
    return f"/model/constants/INT64/{list(sizes)}"


def _node(builder: Any, kind: str, inputs: list[str], output: str, **attributes: Any) -> None:
    name = "/" + output.replace(".", "/")
    builder.make_node(kind, inputs=inputs, outputs=[output], name=f"{name}/{kind}", **attributes)
    builder.make_value(output, builder.io_dtype)
