"""C³A (arXiv:2407.19342, §3): W' = W + C/in, C of circulant blocks, each of which is one trained vector."""

from dataclasses import dataclass

import torch

from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.module import AdaptedModule, complete
from lora_export.contracts import TargetUpdate

NAME = "C3A"
FORMULA = "W + C/in, C of circulant blocks"

_KERNEL = "c3a_kernel"


@dataclass(frozen=True)
class CirculantUpdate:
    """Element (i, j) of block (m, n) is kernel[m, n, (j − i) mod b]; kernel: fp32 (out/b, in/b, b), 1/in inside."""

    kernel: torch.Tensor

    def apply(self, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        _, blocks, size = self.kernel.shape
        row = torch.arange(rows.start, rows.start + len(weight), device=weight.device)
        turned = (torch.arange(size, device=weight.device) - row[:, None]) % size
        places = turned[:, None, :].expand(-1, blocks, -1)
        return weight + self.kernel[row // size].gather(2, places).reshape(weight.shape)


def read(file: AdapterFile) -> list[TargetUpdate]:
    """One update for each linear layer, whatever block_size the configuration gives it: the tensor tells."""
    file.refuse_factor(NAME)
    return [_update(module) for module in complete(file, _KERNEL)]


def _update(module: AdaptedModule) -> TargetUpdate:
    outputs, inputs, size = module.file.shape(module.keys[_KERNEL], 3)

    def load(shape: tuple[int, ...]) -> CirculantUpdate:
        return CirculantUpdate(module.read(_KERNEL) / shape[1])

    return TargetUpdate(module.weight, "c3a", module.used, ((outputs * size, inputs * size),), load, adds=True)
