"""Which weights of an export got more bits so that it keeps the adapter, and what was measured on the way."""

from dataclasses import dataclass

from lora_export.contracts.figures import Figure


@dataclass(frozen=True)
class BudgetStep:
    """An export that was made and measured.

    nbytes: of graphs and data files of the merged model; in_int8, unquantized: how many groups of weights were
    raised to that from the precision that was asked for; share, uncertainty: of the adapter's effect that it keeps,
    and the standard error; kl_lost, kl_allowed: mean KL(merged‖export) in nats, and how much of it the gate allows;
    perplexity: on the text; all three None for a model that predicts no tokens; chosen: whether it was taken.
    """

    nbytes: int
    in_int8: int
    unquantized: int
    share: Figure | None
    uncertainty: Figure
    kl_lost: Figure | None = None
    kl_allowed: Figure | None = None
    perplexity: Figure | None = None
    chosen: bool = False

    def keeps(self, least: float) -> bool:
        """Whether it would pass the gates for what an export keeps. Of no effect, everything is kept."""
        near = self.kl_lost is None or self.kl_allowed is None or self.kl_lost <= self.kl_allowed
        return near and (self.share is None or self.share >= least)


@dataclass(frozen=True)
class BudgetSearch:
    """min_survival, max_size: what was asked for, None where nothing was; groups: how many groups of weights could
    be raised; touched: how many of them the adapter changes; steps: by size."""

    min_survival: Figure | None
    max_size: int | None
    groups: int
    touched: int
    steps: tuple[BudgetStep, ...]
    seconds: Figure
