"""The models that every runtime is given: a run of merge-and-export each, packages of it, and the unmerged model's
answers.

A run and its answers are made once a session, or once at all if LORA_EXPORT_RUNS names a folder to keep them in.
"""

import base64
import json
import os
import shutil
import wave
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from scipy.signal import resample_poly

from tests.consumers.environments import installed, python
from tests.end_to_end.conftest import ROOT, Run, prepared
from tests.packages.conftest import VOCABULARY, save_decoder, save_tokenizer

PROMPTS = (
    "The capital of France is",
    "Fellow citizens of the Senate and of the House,",
    "def add(a, b):",
    "1, 2, 3, 4,",
    "Water boils at",
    "Once upon a time",
)
TEXTS = ("A short one.", "The capital of France is Paris, and has been for a very long time, they say.", "x")
TOKENS = 32
KEPT = os.environ.get("LORA_EXPORT_RUNS")


@dataclass(frozen=True)
class Answers:
    """Of PEFT's unmerged model in fp32. tokens: new greedy tokens of each prompt, text or sound; texts: their
    words; states: of an encoder, the last hidden state of each text's tokens; embeddings: their means, of length
    1."""

    tokens: tuple[tuple[int, ...], ...] = ()
    texts: tuple[str, ...] = ()
    states: tuple[tuple[tuple[float, ...], ...], ...] = ()
    embeddings: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class Delivered:
    """kind: as in answers.MODELS; prompts: texts, or names of WAV files in `root`; root: has base/, adapter/, run/
    and packages/."""

    kind: str
    name: str
    root: Path
    prompts: tuple[str, ...]
    wanted: Answers
    call: Run

    @property
    def merged(self) -> Path:
        return self.root / "run" / "merged"

    def package(self, target: str, *words: object) -> Path:
        """The package for a target, made once. words: further options of `package`."""
        folder = self.root / "packages" / "-".join([target, *(str(w).strip("-") for w in words)])
        if not folder.is_dir():
            code, _, talk = self.call("package", self.root / "run", "--for", target, "-o", folder, *words)
            assert code == 0, talk
        return folder

    def refusal(self, target: str, *words: object) -> str:
        """What `package` says that it cannot do."""
        folder = self.root / "packages" / "refused"
        code, said, talk = self.call("package", self.root / "run", "--for", target, "-o", folder, *words)
        assert code == 1 and not folder.exists(), talk
        return str(said["found"])


def deliver(kind: str, root: Path, call: Run) -> Delivered:
    """The run of a kind of model, in `root`, or where runs are kept."""
    name, build, prompts, ask = _KINDS[kind]
    root = Path(KEPT) / kind if KEPT else root
    if not (root / "wanted.json").is_file():
        root.mkdir(parents=True, exist_ok=True)
        build(root)
        # Latency is measured elsewhere: two seconds beside other tests are no measurement.
        words = ["-b", root / "base", "-a", root / "adapter", "-o", root / "run", "--force"]
        code, _, talk = call("merge-and-export", *words, "--max-time", "2s", "--margin", "50%")
        assert code == 0, talk
        (root / "wanted.json").write_text(json.dumps(asdict(ask(root, prompts))))
    wanted = json.loads((root / "wanted.json").read_text())
    return Delivered(
        kind.removeprefix("tiny-"), name, root, prompts, Answers(**{k: _tuples(v) for k, v in wanted.items()}), call
    )


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def save_lora(model: Any, folder: Path, targets: list[str], std: float = 0.02, **settings: Any) -> None:
    """A LoRA whose B is not zero."""
    torch.manual_seed(5)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=12, target_modules=targets, **settings))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    tuned.save_pretrained(folder)


# --- decoder -----------------------------------------------------------------------------------------------


def _smollm2(root: Path) -> None:
    shutil.copytree(prepared("prepare_smollm2.py"), root / "base", dirs_exist_ok=True)
    shutil.copytree(ROOT / "examples" / "adapters" / "lora-speeches", root / "adapter", dirs_exist_ok=True)


def _unmerged(root: Path, auto: Any) -> Any:
    model = auto.from_pretrained(root / "base", dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, root / "adapter").eval()


def _continued(root: Path, prompts: tuple[str, ...]) -> Answers:
    model = _unmerged(root, transformers.AutoModelForCausalLM)
    reader = transformers.AutoTokenizer.from_pretrained(root / "base")
    said = []
    for prompt in prompts:
        inputs = reader(prompt, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        said.append(tuple(tokens[0, inputs.input_ids.shape[1] :].tolist()))
    return Answers(tuple(said), tuple(reader.decode(s, skip_special_tokens=True) for s in said))


def _tiny_llama(root: Path) -> None:
    """For runtimes that compute slowly here."""
    model = transformers.AutoModelForCausalLM.from_pretrained(save_decoder(root / "base"))
    save_lora(model, root / "adapter", ["q_proj", "v_proj", "down_proj"], std=0.2, task_type="CAUSAL_LM")


# --- encoder -----------------------------------------------------------------------------------------------


def _minilm(root: Path) -> None:
    """With the modules of sentence-transformers: the mean of the states, of length 1."""
    from tests.onnx_export.sentences import save_modules

    shutil.copytree(prepared("prepare_smollm2.py", "--minilm"), root / "base", dirs_exist_ok=True)
    if not (root / "base" / "modules.json").is_file():
        save_modules(root / "base", 384, ("mean_tokens",))
    model = transformers.AutoModel.from_pretrained(root / "base")
    save_lora(model, root / "adapter", ["query", "value"], task_type="FEATURE_EXTRACTION")


def _embedded(root: Path, texts: tuple[str, ...]) -> Answers:
    model = _unmerged(root, transformers.AutoModel)
    reader = transformers.AutoTokenizer.from_pretrained(root / "base")
    with torch.no_grad():
        states = [model(**reader(t, return_tensors="pt")).last_hidden_state[0] for t in texts]
    means = [torch.nn.functional.normalize(s.mean(0), dim=0) for s in states]
    return Answers(states=_tuples([s.tolist() for s in states]), embeddings=_tuples([m.tolist() for m in means]))


# --- encoder-decoder ---------------------------------------------------------------------------------------


def _t5(root: Path) -> None:
    """A random one, as no registry has a trained one under a free licence."""
    torch.manual_seed(2)
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=64, num_layers=2, num_decoder_layers=2, num_heads=4, d_kv=16, d_ff=112,
        decoder_start_token_id=0, pad_token_id=3, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:  # so large that it does not repeat one token
            torch.nn.init.normal_(weight, std=0.075 if "Attention" in name else 0.3)
    model.save_pretrained(root / "base")
    save_tokenizer(root / "base")
    save_lora(model, root / "adapter", ["q", "v", "wo"], std=0.1, task_type="SEQ_2_SEQ_LM")


def _translated(root: Path, texts: tuple[str, ...]) -> Answers:
    model = _unmerged(root, transformers.AutoModelForSeq2SeqLM)
    reader = transformers.AutoTokenizer.from_pretrained(root / "base")
    said = []
    for text in texts:
        tokens = model.generate(**reader(text, return_tensors="pt"), max_new_tokens=TOKENS, do_sample=False)
        said.append(tuple(tokens[0, 1:].tolist()))
    return Answers(tuple(said), tuple(reader.decode(s, skip_special_tokens=True) for s in said))


# --- speech ------------------------------------------------------------------------------------------------

RATE = 16_000
SPOKEN = {
    "ship.wav": "The ship sails at noon, and everyone is on board.",
    "apples.wav": "My name is Sarah. I have five apples and two oranges.",
}
ESPEAK = ("espeakng-loader==0.2.4",)  # a speech synthesizer as a shared library
_SAY = """
import base64, ctypes, json, pathlib
import espeakng_loader
home = pathlib.Path(espeakng_loader.__file__).parent
library = ctypes.CDLL(str(next(home.glob("libespeak-ng.so*"))))
retrieval, utf8 = 1, 1
rate, heard = library.espeak_Initialize(retrieval, 0, str(home).encode(), 0), bytearray()
def callback(samples, count, events):
    if samples and count:
        heard.extend(ctypes.string_at(samples, 2 * count))
    return 0
kept = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)(callback)
library.espeak_SetSynthCallback(kept)
text = {text!r}.encode() + b"\\0"
library.espeak_Synth(text, len(text), 0, 0, 0, utf8, None, None)
library.espeak_Synchronize()
print(json.dumps([rate, base64.b64encode(heard).decode()]))
"""


def _whisper(root: Path) -> None:
    shutil.copytree(prepared("prepare_others.py", "whisper-tiny.en"), root / "base", dirs_exist_ok=True)
    model = transformers.WhisperForConditionalGeneration.from_pretrained(root / "base")
    save_lora(model, root / "adapter", ["q_proj", "v_proj"])
    for name, text in SPOKEN.items():
        rate, heard = python(installed("espeak", ESPEAK), _SAY.format(text=text))
        sound = np.frombuffer(base64.b64decode(heard), "<i2").astype(np.float32)
        resampled = resample_poly(sound, RATE, rate)
        with wave.open(str(root / name), "wb") as out:
            out.setparams((1, 2, RATE, 0, "NONE", "not compressed"))
            out.writeframes(resampled.clip(-32768, 32767).astype("<i2").tobytes())


def sound_of(path: Path) -> Any:
    """Samples of a WAV file, between -1 and 1."""
    with wave.open(str(path), "rb") as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768


def _transcribed(root: Path, names: tuple[str, ...]) -> Answers:
    model = _unmerged(root, transformers.AutoModelForSpeechSeq2Seq)
    reader = transformers.AutoProcessor.from_pretrained(root / "base")
    said = []
    for name in names:
        inputs = reader(sound_of(root / name), sampling_rate=RATE, return_tensors="pt")
        said.append(tuple(model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0].tolist()))
    return Answers(tuple(said), tuple(reader.decode(s, skip_special_tokens=True) for s in said))


_Ask = Callable[[Path, tuple[str, ...]], Answers]
_KINDS: dict[str, tuple[str, Callable[[Path], None], tuple[str, ...], _Ask]] = {
    "decoder": ("SmolLM2-135M-Instruct", _smollm2, PROMPTS, _continued),
    "tiny-decoder": ("tiny Llama", _tiny_llama, PROMPTS, _continued),
    "encoder": ("all-MiniLM-L6-v2", _minilm, TEXTS, _embedded),
    "encoder-decoder": ("tiny T5", _t5, TEXTS, _translated),
    "speech": ("whisper-tiny.en", _whisper, tuple(SPOKEN), _transcribed),
}
