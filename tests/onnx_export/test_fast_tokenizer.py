"""tokenizer.json made of SentencePiece files: the same token ids, or none at all."""

import io
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import transformers

from lora_export.onnx_export.engines import fast_tokenizer

TEXTS = (
    "The cook prepared six pints of soup.",
    "He  said: it's 1,234.5 (of 100%)!",
    "Zoë – 東京 ½ once more </s> and more",
)
CORPUS = Path(transformers.__file__).with_name("tokenization_utils_base.py")  # any long text in English


def _model(kind: str, **options: object) -> bytes:
    lines = [line.strip() for line in CORPUS.read_text(encoding="utf-8").splitlines() if line.strip()][:1500]
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=made, vocab_size=400, model_type=kind,
        character_coverage=0.995, minloglevel=2, **options,
    )  # fmt: skip
    return made.getvalue()


def _settings(folder: Path, model_type: str, **tokenizer: object) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))


def _llama(folder: Path) -> None:
    _settings(folder, "llama", tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>")
    options = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    (folder / "tokenizer.model").write_bytes(_model("bpe", **options))


def _t5(folder: Path) -> None:
    _settings(folder, "t5", tokenizer_class="T5Tokenizer")
    (folder / "spiece.model").write_bytes(_model("unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1))


def _roberta(folder: Path) -> None:
    _settings(folder, "xlm-roberta", tokenizer_class="XLMRobertaTokenizer")
    (folder / "sentencepiece.bpe.model").write_bytes(_model("unigram"))


def _marian(folder: Path) -> None:
    """Its vocabulary is in another order than its pieces, and has those of the other language."""
    _settings(folder, "marian", tokenizer_class="MarianTokenizer", source_lang="en", target_lang="de")
    source = _model("unigram")
    (folder / "source.spm").write_bytes(source)
    (folder / "target.spm").write_bytes(source)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=source)
    own = [pieces.id_to_piece(i) for i in range(3, pieces.get_piece_size())]
    words = ["</s>", "<unk>", ">>de<<", *reversed(own), "▁Straße", "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))


def _m2m100(folder: Path) -> None:
    _settings(folder, "m2m_100", tokenizer_class="M2M100Tokenizer", src_lang="en", tgt_lang="fr")
    source = _model("bpe")
    (folder / "sentencepiece.bpe.model").write_bytes(source)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=source)
    words = ["<s>", "<pad>", "</s>", "<unk>", *(pieces.id_to_piece(i) for i in range(3, pieces.get_piece_size()))]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))


@pytest.mark.parametrize("save", [_llama, _t5, _roberta, _marian, _m2m100])
def test_write_sentencepiece_files_gives_the_same_ids(save, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    save(tmp_path / "model")
    slow = transformers.AutoTokenizer.from_pretrained(tmp_path / "model", local_files_only=True)
    assert fast_tokenizer.write(tmp_path / "model")
    made = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "model" / "tokenizer.json"))
    for text in TEXTS:
        ids = slow(text)["input_ids"]
        assert made(text)["input_ids"] == ids
        assert len(set(ids)) > 8


def test_write_conversion_with_other_tokens_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _marian(tmp_path / "model")
    normal = fast_tokenizer._normalizer

    def lower(proto: object) -> object:
        from tokenizers import normalizers

        return normalizers.Sequence([normal(proto), normalizers.Lowercase()])

    monkeypatch.setattr(fast_tokenizer, "_normalizer", lower)
    assert not fast_tokenizer.write(tmp_path / "model")
    assert not (tmp_path / "model" / "tokenizer.json").exists()


def test_write_folder_without_pieces_is_left_as_it_is(tmp_path: Path) -> None:
    _t5(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "other")
    (tmp_path / "other" / "spiece.model").unlink()
    assert not fast_tokenizer.write(tmp_path / "other")
    assert not (tmp_path / "other" / "tokenizer.json").exists()
