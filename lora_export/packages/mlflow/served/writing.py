"""Models that write a text, a token at a time."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jinja2 import TemplateError

from . import chats
from .graphs import Array
from .models import Model, Refused, rows_of, text_of


@dataclass(frozen=True)
class Choice:
    """How tokens are chosen. temperature: 0 for the likeliest one each time; top_k: of as many of the likeliest, 0
    for all; top_p: of the likeliest that together have this share; seed: None for another one each time."""

    max_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("max_tokens", self.max_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, and at most 1"),
            ("seed", self.seed is None or self.seed >= 0, "0 or more"),
        ):
            if not fits:
                raise Refused(f"{name} is {getattr(self, name)!r}, and {expected} is expected")

    def token(self, logits: Array, random: np.random.Generator) -> int:
        """logits: (vocabulary). ArithmeticError if the model computed what is not a number."""
        if not np.isfinite(logits).any() or np.isnan(logits).any():
            raise ArithmeticError("the model computed logits that are not numbers")
        if self.temperature == 0:
            return int(logits.argmax())
        order = np.argsort(-logits, kind="stable")[: self.top_k or None]
        scaled = logits[order].astype(np.float64) / self.temperature
        shares = np.exp(scaled - scaled[0])
        shares /= shares.sum()
        kept = int(np.searchsorted(np.cumsum(shares), self.top_p)) + 1  # with the one that reaches the share
        return int(random.choice(order[:kept], p=shares[:kept] / shares[:kept].sum()))


class Writer(Model):
    """Continues a text, or the last turn of a chat."""

    columns: ClassVar[tuple[str, ...]] = ("prompt", "messages")

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        super().__init__(folder, config)
        generation = self.document("generation_config.json")
        ends = generation.get("eos_token_id", self.settings.get("eos_token_id"))
        self.ends = frozenset(ends if isinstance(ends, list) else [ends])
        self.forced = generation.get("forced_bos_token_id", self.settings.get("forced_bos_token_id"))
        self.template = chats.template_of(folder, self.document("tokenizer_config.json"))
        self.load()

    def load(self) -> None:
        self.decoder = self.graph("model.onnx")

    def answers(self, data: Any, params: Mapping[str, Any]) -> list[str]:
        choice = Choice(**params)
        rows = [self.ids(row, number) for number, row in enumerate(rows_of(data, self.columns))]
        return [str(self.tokenizer.decode(self.write(ids, choice), skip_special_tokens=True)) for ids in rows]

    def ids(self, row: Mapping[str, Any], number: int) -> list[int]:
        """The tokens of a row. The template of a chat writes special tokens by itself."""
        chat = row.get("messages")
        if chat is not None and "prompt" in row:
            raise Refused(f"row {number} has a prompt and messages, and one of the two is expected")
        text = text_of(row, "prompt", number) if chat is None else self.words(chat, number)
        ids = list(self.tokenizer.encode(text, add_special_tokens=chat is None).ids)
        if not 0 < len(ids) < self.longest:
            raise Refused(f"row {number} has {len(ids)} tokens, and 1 to {self.longest - 1} are expected")
        return ids

    def words(self, chat: Iterable[Any], number: int) -> str:
        """The text of a chat, up to where the answer begins."""
        if self.template is None:
            raise Refused(f"row {number} has messages, and this model has no template for chats: send a prompt")
        try:
            return self.template(chat)
        except (TemplateError, TypeError, ValueError) as error:
            raise Refused(f"the model's template does not take the messages of row {number}: {error}") from None

    def write(self, ids: Sequence[int], choice: Choice) -> list[int]:
        """New tokens behind `ids`, without the one that ends them."""
        return self.continued(list(ids), {}, choice)

    def continued(self, start: list[int], fixed: Mapping[str, Any], choice: Choice) -> list[int]:
        """start: tokens that the decoder reads first; fixed: what it reads besides, in every step."""
        random = np.random.default_rng(choice.seed)
        said: list[int] = []
        cache, step = self.decoder.empty_cache(), start
        for _ in range(min(choice.max_tokens, self.longest - len(start))):
            length = len(start) + len(said)
            feeds = {
                "input_ids": [step],
                "attention_mask": np.ones((1, length)),
                "position_ids": np.arange(length)[None, -len(step) :],
                "use_cache_branch": [bool(said)],
            }
            logits, cache = self.decoder.step(feeds | dict(fixed), cache)
            token = int(self.forced) if self.forced and not said else choice.token(logits, random)
            if token in self.ends:
                break
            said.append(token)
            step = [token]
        return said


class Rewriter(Writer):
    """Reads a text, and writes another."""

    columns: ClassVar[tuple[str, ...]] = ("prompt",)

    def load(self) -> None:
        self.encoder = self.graph("encoder_model.onnx")
        self.decoder = self.graph("decoder_model_merged.onnx")

    def write(self, ids: Sequence[int], choice: Choice) -> list[int]:
        mask = np.ones((1, len(ids)), np.int64)
        states = self.encoder.run({"input_ids": [ids], "attention_mask": mask})["last_hidden_state"]
        start = [int(self.settings.get("decoder_start_token_id") or 0)]
        fixed = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
        return self.continued(start, fixed, choice)
