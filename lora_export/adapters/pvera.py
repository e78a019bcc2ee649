"""PVeRA (arXiv:2512.07703): VeRA whose A·x is the mean and the spread of a distribution; its mean is what merges.

A and λd have 2·r rows, the second half of which are the logarithms of the variances: they do not enter outside of
training, unless the adapter is told to draw at inference.
"""

from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.vera import Names, read_shared
from lora_export.contracts import TargetUpdate

NAME = "PVeRA"
FORMULA = "W + diag(λb)·B[:out]·diag(λd[:r])·A[:r, :in], A and B shared by all layers"


def read(file: AdapterFile) -> list[TargetUpdate]:
    """As for VeRA. AdapterError for one that draws at inference: no weight equals it."""
    if file.config.get("sample_at_inference"):
        raise file.refuse(
            "sample_at_inference is set: every forward draws another change, so no merged weight equals it",
            expected="sample_at_inference: false, which takes the mean",
            next_step="serve it unmerged with PEFT, or set sample_at_inference to false for the mean",
        )
    return read_shared(file, Names("pvera", 2))
