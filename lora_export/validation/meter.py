"""What one export after another keeps of the adapter: the unmerged model runs once for all of them."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_export.contracts import AdapterChoice, ExportedPair, Progress, ValidationOptions
from lora_export.validation.comparing.comparison import Comparison, Graph
from lora_export.validation.effect.precisions import kl_limit
from lora_export.validation.graphs.exports import arithmetic_of
from lora_export.validation.run import prepared
from lora_export.validation.stages import combined, measured_by


@dataclass(frozen=True)
class Kept:
    """share, uncertainty: of the adapter's effect, and its standard error, as a validation has them; kl_lost,
    kl_allowed: mean KL(merged‖export) in nats, and its limit; perplexity: on the text; all three None for a model
    that predicts no tokens."""

    share: float | None
    uncertainty: float
    kl_lost: float | None
    kl_allowed: float | None
    perplexity: float | None


@dataclass(frozen=True)
class Meter:
    comparison: Comparison[Any, Any]
    provider: str

    def measure(self, pair: ExportedPair) -> Kept:
        """What the graphs of a pair keep, on the text and the inputs of the validation."""
        base, merged = (
            Graph(paths, None, arithmetic_of(pair, paths), self.provider, pair.prefix)
            for paths in (pair.base_graphs, pair.merged_graphs)
        )
        effect = self.comparison.effect_of(base, merged)
        perplexities = effect.perplexities([("Q", pair.name)])
        far = effect.fidelity
        return Kept(
            effect.share,
            effect.uncertainty,
            far.lost if far is not None else None,
            kl_limit(far) if far is not None else None,
            perplexities[0].value if perplexities else None,
        )


@contextlib.contextmanager
def metered(
    base: Path,
    adapters: Sequence[AdapterChoice],
    merged: Path,
    *,
    dequantized: Path | None,
    options: ValidationOptions,
    scratch: Path,
    progress: Progress,
) -> Iterator[Meter]:
    """base … dequantized: as in `validate`, but of `merged` no numbers are read; options: with a seed; scratch: a
    folder for the outputs of the unmerged model, which leaves the memory before the first export is measured."""
    with (
        prepared(base, adapters, merged, (), dequantized, True, options, progress) as task,
        tempfile.TemporaryDirectory(prefix="outputs-", dir=scratch) as outputs,
    ):
        comparison = measured_by(task if options.merge.combine == "none" else combined(task), Path(outputs))
        yield Meter(comparison, options.provider)
