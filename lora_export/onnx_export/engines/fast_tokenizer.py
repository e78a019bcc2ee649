"""tokenizer.json for a model whose folder only has SentencePiece files: transformers.js and onnxruntime-genai read
nothing else.

It is written only if it gives the tokens that SentencePiece gives, on texts that set normalizations apart.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAME = "tokenizer.json"
_PIECES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm")
_TEXTS = (
    "The ship sails at noon; the captain's log says so.",
    "two  spaces, a\ttab and 1,234.5 (of 100%)",
    "Ünïcödé, naïve café ½ … “quoted” – 東京 Москва 😀",
    "CamelCase under_score https://example.org/a?b=c",
)
_UNREACHABLE = -1e6  # score of a piece that the model for this side does not have


def write(folder: Path) -> bool:
    """Write tokenizer.json beside the SentencePiece files in `folder`; whether there is one afterwards."""
    pieces = next((folder / name for name in _PIECES if (folder / name).is_file()), None)
    if (folder / NAME).is_file() or pieces is None:
        return (folder / NAME).is_file()
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception:  # what tokenizers raises has no other base; a model without a tokenizer still exports
        return False
    made = tokenizer.backend_tokenizer if tokenizer.is_fast else _converted(tokenizer, pieces)
    if made is None or not _agrees(made, tokenizer, pieces):
        return False
    made.no_padding()
    made.no_truncation()
    made.save(str(folder / NAME))
    return True


def _agrees(made: Any, tokenizer: Any, pieces: Path) -> bool:
    """Whether it gives transformers' ids, or SentencePiece's pieces where transformers has no other way to them."""
    from sentencepiece import SentencePieceProcessor

    if not tokenizer.is_fast:
        return all(made.encode(text).ids == tokenizer(text)["input_ids"] for text in _TEXTS)
    plain = SentencePieceProcessor(model_file=str(pieces))
    return all(
        _known(made, made.encode(text, add_special_tokens=False).ids) == _known_pieces(plain, text)
        for text in _TEXTS
    )


def _known(made: Any, ids: Sequence[int]) -> list[str]:
    """Their pieces; the unknown one has a name of its own in each library."""
    unknown = made.model.token_to_id(getattr(made.model, "unk_token", None) or "<unk>")
    return ["?" if i == unknown else made.id_to_token(i) for i in ids]


def _known_pieces(plain: Any, text: str) -> list[str]:
    return ["?" if i == plain.unk_id() else plain.id_to_piece(i) for i in plain.encode(text)]


# --- tokenizers that transformers has in Python only -------------------------------------------------------


def _converted(slow: Any, pieces: Path) -> Any:
    """Marian's and M2M100's: SentencePiece splits, and a vocabulary of their own has the ids. None for another."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors

    words = sorted(slow.get_vocab().items(), key=lambda item: item[1])
    if getattr(slow, "separate_vocabs", False) or [i for _, i in words] != list(range(len(words))):
        return None
    proto = _read(pieces)
    made = Tokenizer(_model([word for word, _ in words], proto, slow))
    made.normalizer = _normalizer(proto)
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    known = {piece.piece for piece in proto.pieces}
    special = {*slow.all_special_tokens, *(word for word, _ in words if word not in known and _is_language(word))}
    made.add_special_tokens([AddedToken(w, special=True, normalized=False) for w, _ in words if w in special])
    around = slow.build_inputs_with_special_tokens([-1])
    at = around.index(-1)
    names = {i: slow.convert_ids_to_tokens(i) for i in around if i >= 0}
    made.post_processor = processors.TemplateProcessing(
        single=[*(names[i] for i in around[:at]), "$A", *(names[i] for i in around[at + 1 :])],
        special_tokens=[(name, i) for i, name in names.items()],
    )
    return made


def _is_language(word: str) -> bool:
    return (word.startswith(">>") and word.endswith("<<")) or (word.startswith("__") and word.endswith("__"))


def _read(pieces: Path) -> Any:
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    proto.ParseFromString(pieces.read_bytes())
    return proto


def _model(words: Sequence[str], proto: Any, slow: Any) -> Any:
    from tokenizers import models

    scores = {piece.piece: piece.score for piece in proto.pieces}
    if proto.trainer_spec.model_type == 1:
        vocabulary = [(word, scores.get(word, _UNREACHABLE)) for word in words]
        return models.Unigram(vocabulary, unk_id=slow.unk_token_id, byte_fallback=proto.trainer_spec.byte_fallback)
    ids = {word: i for i, word in enumerate(words)}
    merges = [
        (word[:cut], word[cut:])
        for word in sorted((w for w in words if w in scores), key=lambda w: -scores[w])
        for cut in range(1, len(word))
        if word[:cut] in scores and word[cut:] in scores and word[:cut] in ids and word[cut:] in ids
    ]
    return models.BPE(ids, merges, unk_token=slow.unk_token, fuse_unk=True)


def _normalizer(proto: Any) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if proto.normalizer_spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap))
    if proto.normalizer_spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    return normalizers.Sequence(steps)
