"""Calibration texts, as a file has them or built in, and what a model's graphs are fed with of them."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_export.errors import ExportError, InputError
from lora_export.storage import sealed

# Gibbon, Darwin, Dickens, Whitman, Poe and others, long in the public domain; the rest was written for this page.
# Nothing of it is in the texts that models are judged on.
BUILT_IN = Path(__file__).parent / "texts" / "calibration.txt"
LONGEST = 512  # tokens of a window, or of a text
LARGEST = 2**30  # bytes of a file
_SAMPLED = 64  # characters a token: of a text that is longer than this, only stretches are tokenized
_POSITIONS = (
    "max_position_embeddings", "n_positions", "max_target_positions", "max_decoder_position_embeddings",
)  # fmt: skip
_ROOM = 16  # characters a token, so that a stretch has enough of them


@dataclass(frozen=True)
class CalibrationText:
    """sha256: of the file's bytes."""

    path: Path
    text: str
    sha256: str

    @property
    def lines(self) -> list[str]:
        """Those that are not blank."""
        return [line for line in self.text.splitlines() if line.strip()]


def read(path: Path | None) -> CalibrationText:
    """A UTF-8 text file, or the built-in page. InputError for a file without text."""
    where = path or BUILT_IN
    try:
        with where.open("rb") as file:
            raw = file.read(LARGEST + 1)
        text = raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the file cannot be read: {error}", where=where, expected="UTF-8") from None
    if len(raw) > LARGEST:
        raise InputError(
            f"the file has more than {LARGEST} bytes", where=where, expected="texts that are read as a whole"
        )
    if not text.strip():
        raise InputError("the file has no texts", where=where, expected="one text per line")
    return CalibrationText(where, text, hashlib.sha256(raw).hexdigest())


@dataclass(frozen=True)
class Rows:
    """A tokenizer, and what it makes of texts: rows of at most `longest` ids, all below `vocabulary`."""

    tokenizer: Any
    longest: int
    vocabulary: int | None

    @classmethod
    def of(cls, model: Path) -> "Rows":
        """From a Hugging Face folder. ExportError if it has no tokenizer."""
        import transformers

        config = sealed.read_json(model / "config.json", limit=sealed.LARGEST_SETTINGS)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True)
        except Exception as error:  # transformers' errors for a missing tokenizer share no base but this one
            raise ExportError(
                f"the model has no tokenizer that can be loaded: {' '.join(str(error).split())[:300]}",
                where=model,
                expected="tokenizer.json, or another tokenizer of transformers, for calibration texts",
                next_step="--quantizer default, which needs no calibration",
            ) from None
        most = [LONGEST, int(getattr(tokenizer, "model_max_length", None) or LONGEST)]
        most += [n for n in (_number(config, name) for name in _POSITIONS) if n]
        return cls(tokenizer, min(most), _number(config, "vocab_size"))

    def windows(self, text: str, tokens: int) -> list[list[int]]:
        """Running text in whole windows, of `tokens` together at most, taken at even distances.

        Each begins with what the tokenizer puts before a text.
        """
        before = self._before()
        each = max(1, min(self.longest, tokens) - len(before))
        count = max(1, tokens // (each + len(before)))
        if len(text) > _SAMPLED * tokens:
            stretches = [text[at : at + _ROOM * each] for at in _even(len(text), count)]
            pieces = [self._plain(stretch)[:each] for stretch in stretches]
        else:
            ids = self._plain(text)
            pieces = [ids[at : at + each] for at in range(0, len(ids), each)]
            if len(pieces) > count:
                pieces = [pieces[i] for i in _even(len(pieces), count)]
        return [[*before, *piece] for piece in pieces if piece]

    def texts(self, lines: Sequence[str], tokens: int) -> list[list[int]]:
        """One row a text, each with the tokenizer's special tokens; as many at even distances as have `tokens`."""
        rows = [(row,) for row in map(self.row, lines) if row]
        return [row for (row,) in _spread(rows, tokens)]

    def pairs(self, lines: Sequence[str], first: int, tokens: int) -> list[tuple[list[int], list[int]]]:
        """Of each line `source` or `source<TAB>target` the ids of the source, and those that the decoder reads:
        `first`, and the target's but for the last. Without a target, that is the source."""
        found = []
        for line in lines:
            source, _, target = line.partition("\t")
            ids, written = self.row(source), self.row(target if target.strip() else source)
            if ids and written:
                found.append((ids, [first, *written[:-1]]))
        return [(source, target) for source, target in _spread(found, tokens)]

    def row(self, text: str) -> list[int]:
        """One text with the tokenizer's special tokens, cut to `longest`."""
        ids = self.tokenizer(text, truncation=True, max_length=self.longest)["input_ids"]
        return self._known(ids)

    def _plain(self, text: str) -> list[int]:
        return self._known(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _before(self) -> list[int]:
        """The special tokens before a text."""
        whole = self.tokenizer("a")["input_ids"]
        inner = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        for at in range(len(whole) - len(inner) + 1):
            if whole[at : at + len(inner)] == inner:
                return self._known(whole[:at])
        return []

    def _known(self, ids: Sequence[int]) -> list[int]:
        return [int(i) for i in ids if self.vocabulary is None or i < self.vocabulary]


def first_of_target(model: Path) -> int:
    """The id that a decoder's input begins with. ExportError if config.json does not say."""
    files = [model / name for name in ("config.json", "generation_config.json")]
    configs = [sealed.read_json(f, limit=sealed.LARGEST_SETTINGS) for f in files if f.is_file()]
    names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    known = (_number(config, name) for name in names for config in configs)
    found = next((number for number in known if number is not None), None)
    if found is None:
        raise ExportError(
            "config.json does not say with which token the decoder begins",
            where=model / "config.json",
            expected="decoder_start_token_id",
        )
    return found


def _number(config: Mapping[str, Any], name: str) -> int | None:
    """A setting of the model, or of the part of it that reads text."""
    for part in (config, config.get("text_config"), config.get("decoder")):
        value = part.get(name) if isinstance(part, Mapping) else None
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
    return None


def _even(length: int, count: int) -> list[int]:
    """`count` places from 0 to below `length`, at even distances."""
    return [i * length // count for i in range(count)]


def _spread(rows: Sequence[tuple[list[int], ...]], tokens: int) -> list[tuple[list[int], ...]]:
    """As many rows at even distances as have at most `tokens` together, but one at least."""
    sizes = [sum(map(len, row)) for row in rows]
    count = len(rows)
    while count > 1 and sum(sizes[i] for i in _even(len(rows), count)) > tokens:
        count = min(count - 1, max(1, count * tokens // max(1, sum(sizes[i] for i in _even(len(rows), count)))))
    return [rows[i] for i in _even(len(rows), count)]
