"""Cells of the matrix that do not run, each with the words of the refusal."""

import importlib.util

Cells = dict[tuple[str, str], str]


def _all(words: str, *cells: tuple[str, str]) -> Cells:
    return dict.fromkeys(cells, words)


PEFT_REFUSES: Cells = {
    # The model asks its convolution for the stride, which PEFT's wrapper does not have.
    **_all(
        "no attribute 'stride'",
        ("lora convolution", "whisper"),
        ("lora convolution rslora", "whisper"),
        ("dora convolution", "whisper"),
        ("loha convolution", "whisper"),
        ("loha tucker", "whisper"),
        ("lokr convolution", "whisper"),
        ("lokr tucker", "whisper"),
        ("hira convolution", "whisper"),
    ),
    # PEFT decomposes a Conv1D's weight as it is stored, transposed.
    **_all(
        "mat1 and mat2 shapes",
        ("lora olora", "gpt2"),
    ),
    # PEFT replicates the layers, but not the configuration's list of their types.
    **_all(
        "list index out of range",
        ("lora replication", "qwen2"),
    ),
    # Layers that this kind of PEFT does not wrap.
    **_all(
        "is not supported",
        ("adalora convolution", "whisper"),
        ("adalora convolution", "wav2vec2"),
        ("adalora convolution", "videomae"),
        ("ia3 convolution", "whisper"),
        ("ia3 convolution", "wav2vec2"),
        ("oft", "gpt2"),
        ("oft neumann", "gpt2"),
        ("oft shared", "gpt2"),
        ("oft convolution", "whisper"),
        ("oft convolution", "wav2vec2"),
        ("oft convolution", "videomae"),
        ("boft", "gpt2"),
        ("boft butterflies", "gpt2"),
        ("beft", "gpt2"),
        ("psoft", "gpt2"),
        ("psoft pissa", "gpt2"),
        ("psoft neumann", "gpt2"),
        ("psoft lowrank", "gpt2"),
        ("supertuning", "gpt2"),
        ("supertuning supra", "gpt2"),
    ),
    **_all(
        "does not support",
        ("glora", "gpt2"),
        ("glora vector", "gpt2"),
        ("glora constant", "gpt2"),
        ("glora none", "gpt2"),
        ("glora bias", "gpt2"),
        ("peanut", "gpt2"),
        ("peanut deep", "gpt2"),
        ("hira convolution", "regnet"),
    ),
    **_all(
        "is not supported",
        *((kind, "gpt2") for kind in ("miss", "miss mini", "miss bat", "miss bias", "hra", "hra orthogonal")),
        *((kind, "gpt2") for kind in ("road", "road 2", "road 4", "shira", "c3a", "delora")),
        *(("hra convolution", family) for family in ("whisper", "wav2vec2", "videomae")),
    ),
    **_all("does not support Conv2d layers with groups", ("hra convolution", "regnet")),
    # PEFT takes the inputs of all groups for those of one.
    **_all(
        "is invalid for input of size",
        ("adalora convolution", "regnet"),
    ),
    # Layers that LoHa and LoKr of PEFT do not wrap.
    **_all(
        "not supported",
        ("loha", "gpt2"),
        ("loha patterns", "gpt2"),
        ("loha convolution", "videomae"),
        ("loha tucker", "videomae"),
        ("lokr", "gpt2"),
        ("lokr both", "gpt2"),
        ("lokr factor", "gpt2"),
        ("lokr convolution", "videomae"),
        ("lokr tucker", "videomae"),
    ),
    # PEFT unfolds the image with the wrong stride.
    **_all(
        "maximum size for tensor",
        ("oft convolution", "resnet"),
    ),
}
if importlib.util.find_spec("sklearn"):
    PEFT_REFUSES |= _all("is not supported", ("adamss", "gpt2"))
WE_REFUSE: Cells = {
    # A layer without a bias, to which this kind adds one.
    **_all(
        "adds a bias to a layer that has none",
        ("beft", "qwen2"),
    ),
    **_all(
        "mixes the channels of all groups",
        ("lora convolution", "regnet"),
        ("lora convolution rslora", "regnet"),
        ("dora convolution", "regnet"),
    ),
    **_all(
        "adds up the rotated patches",
        ("oft convolution", "vit"),
        ("oft convolution", "regnet"),
    ),
}
