"""Token ids for models that read text: of the prompts, by the folder's own tokenizer, or seeded ones."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from lora_export.errors import InputError
from lora_export.validation.comparing import lengths
from lora_export.validation.comparing.tested_model import ModelUnderTest, setting
from lora_export.validation.comparing.texts import MAX_TOKENS, tokenize

CODE_POINTS = 0x110000  # of Unicode, which CANINE reads
_PAGE = 1000  # of LayoutLM's coordinates
RANDOM_LENGTHS = (5, 11, 23, 37, 48, 64)
_TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json",
)  # fmt: skip


@dataclass(frozen=True)
class Texts:
    """tokens: ids (length,) of each prompt; long: of texts whose lengths were drawn, and those around windows;
    tokenizer: something with `decode`; random: why the ids are random, if they are; lengths: those of `long`."""

    tokens: list[torch.Tensor]
    tokenizer: Any
    long: list[torch.Tensor] = field(default_factory=list)
    random: str = ""
    lengths: str = ""

    @property
    def note(self) -> str:
        """On what it is measured, besides the prompts."""
        return "; ".join(n for n in (self.random, self.lengths) if n)


class NoTokenizer:
    """Stands for a tokenizer where the folder has none: a text is its token ids."""

    def decode(self, ids: torch.Tensor | int | Sequence[int], skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, torch.as_tensor(ids).reshape(-1).tolist()))


def token_lists(subject: ModelUnderTest, room: int = 0) -> Texts:
    """Ids of each prompt, in the model's vocabulary. room: positions to leave free after each.

    InputError if the folder has a tokenizer that does not load, or if no prompt has two tokens.
    """
    limit = positions(subject.model, room)
    words = vocabulary(subject.model)
    chosen = lengths.choose(subject.model, subject.seed, words)
    if any((subject.folder / name).is_file() for name in _TOKENIZERS):
        tokenizer = _tokenizer(subject.folder)
        tokens = [ids[:limit] for ids in tokenize(tokenizer, subject.prompts, words)]
        if not tokens:
            raise InputError(
                "no prompt has two tokens or more", where=subject.options.prompts or "built-in prompts"
            )
        running = torch.tensor(tokenizer(subject.text, verbose=False)["input_ids"])
        running = running[running < words]
        drawn = _pieces(running, chosen.tokens, subject.seed) if len(running) else _random(subject, chosen.tokens)
        return Texts(tokens, tokenizer, drawn, "", chosen.words)
    note = "on seeded random token ids, because there is no tokenizer"
    if subject.options.prompts is not None:
        raise InputError(
            "the model cannot read the prompts: there is no tokenizer in the base or an adapter",
            where=subject.options.prompts,
            expected="tokenizer.json or the files of a known tokenizer, in the base's folder",
            next_step="the same command without --prompts",
        )
    subject.progress.warn(f"validation compares {note}")
    prompts = _random(subject, sorted({min(n, limit) for n in RANDOM_LENGTHS}))
    return Texts(prompts, NoTokenizer(), _random(subject, chosen.tokens), note, chosen.words)


def vocabulary(model: Any) -> int:
    """How many token ids the model both reads and predicts: Mllama and Moshi read a few more than they predict.

    Two towers have no one input embedding, and CANINE has none at all; their configuration tells.
    """
    config = model.config.get_text_config()
    stated = (getattr(config, name, None) for name in ("vocab_size", "unpadded_vocab_size"))
    sizes = [n for n in stated if isinstance(n, int)]
    for ask in ("get_input_embeddings", "get_output_embeddings"):
        try:
            weight = getattr(model, ask)().weight
        except (NotImplementedError, AttributeError):
            continue
        if weight.dim() == 2:
            sizes.append(weight.shape[0])
    return min(sizes, default=CODE_POINTS)


def positions(model: Any, room: int) -> int:
    """How many tokens a prompt may have, with `room` positions left free after it."""
    known = lengths.most_positions(model)
    return MAX_TOKENS if known is None else min(MAX_TOKENS, max(known - room, min(known // 2, 8)))


def _pieces(running: torch.Tensor, sizes: Sequence[int], seed: int) -> list[torch.Tensor]:
    """Of a running text, each from a drawn place on; it begins anew where it ends."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(running), (len(sizes),), generator=generator).tolist()
    return [running[torch.arange(start, start + n) % len(running)] for start, n in zip(starts, sizes, strict=True)]


def _random(subject: ModelUnderTest, sizes: Sequence[int]) -> list[torch.Tensor]:
    """No padding, begin or end among them: those change masks, positions and pooling; BART wants one end."""
    config = subject.model.config.get_text_config()
    named = (setting(config, f"{name}_token_id") for name in ("pad", "bos", "eos", "decoder_start"))
    special = {i for ids in named for i in (ids if isinstance(ids, list | tuple) else (ids,))}
    allowed = torch.tensor([i for i in range(vocabulary(subject.model)) if i not in special])
    generator = torch.Generator().manual_seed(subject.seed)
    lists = [allowed[torch.randint(len(allowed), (n,), generator=generator)] for n in sizes]
    end = setting(config, "eos_token_id")
    end = end[0] if isinstance(end, list | tuple) and end else end
    if subject.model.config.is_encoder_decoder and isinstance(end, int):
        lists = [torch.cat([ids[:-1], torch.tensor([end])]) for ids in lists]
    return lists


def padded(tokens: Sequence[torch.Tensor], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both (batch, longest), padded on the right."""
    ids = torch.nn.utils.rnn.pad_sequence(list(tokens), batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(t) for t in tokens])
    return ids, (torch.arange(ids.shape[1])[None] < lengths[:, None]).to(ids.dtype)


def boxes(config: Any, shape: Sequence[int]) -> torch.Tensor:
    """Seeded places of tokens on a page, (*shape, 4): left, top, right, bottom."""
    most = setting(config, "max_2d_position_embeddings") or _PAGE
    generator = torch.Generator().manual_seed(shape[-1])
    corners = torch.randint(0, min(most, _PAGE), (*shape, 2, 2), generator=generator)
    return corners.sort(dim=-2).values.flatten(-2)


def _tokenizer(folder: Path) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # what tokenizers raises has no other base
        raise InputError(
            f"the tokenizer cannot be loaded: {(str(error).splitlines() or [type(error).__name__])[0]}",
            where=folder,
            expected="tokenizer.json or the files of a known tokenizer",
        ) from None
