"""IA³ as LyCORIS has it (arXiv:2205.05638): W·(1 + w), for each output or each input channel. PEFT's has no 1."""

import math

from lora_export.adapters.diffusion.kinds.module import Trained, Whole
from lora_export.adapters.diffusion.pieces import Shape
from lora_export.adapters.ia3 import ColumnScale, RowScale


def read_ia3(trained: Trained) -> list[Whole]:
    """weight: (n,) or (1, n, 1, …); on_input: 1 for input channels, 0 for outputs. The bias stays."""
    trained.file.refuse_weight("(IA)³", trained.module.keys["weight"])
    shape = trained.shape("weight")
    size = math.prod(shape)
    if not shape or (len(shape) > 1 and shape[1] != size) or size == 0:
        raise trained.disagree("(n,) or (1, n, 1, …)", "weight")
    side = trained.read("on_input").reshape(-1)
    if len(side) != 1 or float(side[0]) not in (0.0, 1.0):
        raise trained.disagree("0 for outputs or 1 for inputs", "on_input")
    on_input = float(side[0]) == 1.0
    stored = trained.stored("weight")
    outputs = trained.height("weight") if on_input else size
    rest = (size, *stored[2:]) if on_input else stored[1:]

    def load(_: Shape) -> RowScale | ColumnScale:
        factors = 1 + trained.read("weight").reshape(-1)
        return ColumnScale(factors, outputs) if on_input else RowScale(factors)

    return [Whole("ia3", ("weight", "on_input"), outputs, rest, load)]
