"""What a package for llama.cpp and Ollama holds: NAME-F16.gguf for each type of weights, and a Modelfile."""

# Types of the converter's --outtype, the most exact first; 16-bit types by what they keep of a float32.
TYPES = ("f32", "bf16", "f16", "q8_0")
OF_DTYPE = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}  # a merged folder's type → the same in GGUF


def model_file(name: str, kind: str) -> str:
    """The file of the model `name` in a type, as llama.cpp's files are called."""
    return f"{name}-{kind.upper()}.gguf"


def lora_file(name: str) -> str:
    """The file of its adapter, whose matrices are not rounded."""
    return f"{name}-F32-LoRA.gguf"


def precision(kind: str, dtype: str) -> str:
    """What a file of this type computes with, made of a merged folder of the type `dtype`."""
    return dtype if kind == "f32" else kind
