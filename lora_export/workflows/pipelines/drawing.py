"""A picture drawn by exported graphs: diffusers' own pipeline, with ONNX Runtime in place of its models."""

import contextlib
import inspect
import logging
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_export.contracts import Progress
from lora_export.errors import ExportError, RuntimeUnavailable
from lora_export.packages.job import Drawing
from lora_export.packages.pipelines.laying import INDEX, parts_in
from lora_export.storage import sealed

if TYPE_CHECKING:
    import onnxruntime

GRAPH, CONFIG = "model.onnx", "config.json"
DENOISERS = ("unet", "transformer")
DECODER = "vae_decoder"
# Inputs that diffusers gives by position.
_OF_ENCODER, _OF_DENOISER = ("input_ids", "attention_mask"), ("sample", "timestep", "encoder_hidden_states")
# What diffusers calls an input in a mapping of its own.
_ADDED, _ADDED_WIDTH = "added_cond_kwargs", "projection_class_embeddings_input_dim"
_RENAMED = {"out_sample": "sample"}
_TYPES: Mapping[str, Any] = {
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}  # fmt: skip
_STATE = "hidden_states."
_TIMES = 3


def draw(
    folder: Path, class_name: str, prompt: str, how: Drawing, target: Path, provider: str, progress: Progress
) -> None:
    """Draw a picture with the graphs of `folder`, in Optimum's layout, and write it to `target`, a PNG.

    ExportError for a picture that proves nothing: of one colour, or not of numbers. RuntimeUnavailable without
    diffusers.
    """
    progress.stage(f"sample: a picture of {how.width} × {how.height} pixels in {how.steps} steps, by the graphs")
    with _quiet():
        drawn = _called(_pipeline(folder, class_name, provider), prompt, how)
    pixels = np.round(255 * drawn).astype(np.uint8) if np.isfinite(drawn).all() else None
    if pixels is None or (pixels == pixels[0, 0]).all():
        raise ExportError(
            "the graphs draw a picture of one colour" if pixels is not None else "the graphs draw no numbers",
            where=folder,
            expected="a picture, which shows whether another runtime draws the same one",
            next_step="lora-export validate, or another --precision",
        )
    from PIL import Image

    Image.fromarray(pixels).save(target, format="PNG")


def seconds_of(folder: Path, class_name: str, prompt: str, how: Drawing, longest: float) -> float:
    """How long the graphs of `folder` draw a picture, all of them loaded: the median of three, or of as many as
    begin within `longest` seconds. The one before these, which nobody times, loads."""
    taken: list[float] = []
    with _quiet():
        pipeline = _pipeline(folder, class_name, keep=True)
        _called(pipeline, prompt, replace(how, steps=1))
        while len(taken) < _TIMES and sum(taken) <= longest:
            start = time.perf_counter()
            _called(pipeline, prompt, how)
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _called(pipeline: Any, prompt: str, how: Drawing) -> "np.ndarray[Any, Any]":
    """(height, width, 3), from 0 to 1."""
    import torch

    noise = np.random.RandomState(how.seed).standard_normal(how.latents)
    more = {} if how.tokens is None else {"max_sequence_length": how.tokens}
    with torch.no_grad():
        made = pipeline(
            prompt,
            height=how.height,
            width=how.width,
            num_inference_steps=how.steps,
            guidance_scale=how.guidance,
            latents=torch.from_numpy(noise).float(),
            output_type="np",
            **more,
        )
    return np.asarray(made.images[0])


def _pipeline(folder: Path, class_name: str, provider: str = "cpu", keep: bool = False) -> Any:
    """diffusers' pipeline over the graphs. What an exported folder has no graph of is absent. keep: all sessions
    stay open, not only those of one stage."""
    try:
        import diffusers
        import transformers
    except ImportError as error:
        raise RuntimeUnavailable(
            f"diffusers is not installed, and a package of a pipeline has a picture that it draws: {error}",
            expected="the package diffusers",
            next_step="pip install 'lora-export[diffusion]'",
        ) from None
    index = sealed.read_json(folder / INDEX)
    cls = getattr(diffusers, class_name)
    given: dict[str, Any] = {}
    open_graphs: list[_Graph] = []
    for name in parts_in(index):
        graph = DECODER if name == "vae" else name
        if (folder / graph / GRAPH).is_file():
            given[name] = _module(_Graph(folder / graph, provider, [] if keep else open_graphs))
        elif name == "scheduler" or name.startswith("tokenizer"):
            library = diffusers if name == "scheduler" else transformers
            given[name] = getattr(library, str(index[name][1])).from_pretrained(folder / name)
    given |= {k: v for k, v in index.items() if not (isinstance(v, list) or k.startswith("_"))}
    given |= {"requires_safety_checker": False, "add_watermarker": False}
    known = inspect.signature(cls.__init__).parameters
    made = cls(**{name: given.get(name) for name in known if name in given or _is_needed(known[name])})
    made.set_progress_bar_config(disable=True)
    return made


def _is_needed(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.name != "self"


class _Graph:
    """A session, open from its first run until a later stage of the pipeline begins."""

    def __init__(self, folder: Path, provider: str, opened: "list[_Graph]") -> None:
        self.folder, self.provider, self.opened = folder, provider, opened
        self.config = sealed.read_json(folder / CONFIG)
        self._session: onnxruntime.InferenceSession | None = None

    @property
    def _stage(self) -> int:
        """Text encoders, the denoiser, the decoder."""
        name = self.folder.name
        return 1 if name in DENOISERS else 2 if name == DECODER else 0

    def run(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Output → tensor, of those of `given` that the graph reads."""
        import torch

        session = self._open()
        feeds = {}
        for value in session.get_inputs():
            if given.get(value.name) is None:
                raise ExportError(
                    f"the graph reads {value.name}, which diffusers does not give it", where=self.folder
                )
            array = np.asarray(given[value.name], _TYPES[value.type])
            feeds[value.name] = array if value.shape else array.reshape(())
        names = [value.name for value in session.get_outputs()]
        found = session.run(names, feeds)
        return {_RENAMED.get(n, n): torch.from_numpy(np.asarray(f)) for n, f in zip(names, found, strict=True)}

    def _open(self) -> "onnxruntime.InferenceSession":
        from lora_export.runtime import open_session

        if self._session is None:
            for earlier in [g for g in self.opened if g._stage < self._stage]:
                earlier._session = None
                self.opened.remove(earlier)
            self._session = open_session(self.folder / GRAPH, self.provider)
            self.opened.append(self)
        return self._session


def _module(graph: _Graph) -> Any:
    """What a pipeline of diffusers calls as a model: positions and mappings become names of inputs."""
    import torch
    from diffusers.configuration_utils import FrozenDict

    first = _OF_DENOISER if graph.folder.name in DENOISERS else _OF_ENCODER

    class Module(torch.nn.Module):
        dtype = torch.float32
        device = torch.device("cpu")
        config = FrozenDict(graph.config)  # type: ignore[no-untyped-call]
        # SDXL asks its UNet for the width of what it adds to a step.
        add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=graph.config.get(_ADDED_WIDTH)))

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            given = dict(zip(first, args, strict=False)) | kwargs | (kwargs.get(_ADDED) or {})
            return _Outputs(graph.run(given))

        def decode(self, latents: Any, **kwargs: Any) -> Any:
            return _Outputs(graph.run({"latent_sample": latents}))

        @contextlib.contextmanager
        def cache_context(self, name: str) -> Iterator[None]:
            yield

    return Module()


class _Outputs(tuple[Any, ...]):
    """By position, and by name as transformers has them."""

    hidden_states: list[Any]

    def __new__(cls, found: Mapping[str, Any]) -> "_Outputs":
        states = [v for n, v in found.items() if n.startswith(_STATE)]
        whole = {n: v for n, v in found.items() if not n.startswith(_STATE)}
        made = super().__new__(cls, whole.values())
        made.__dict__.update(whole, hidden_states=states)
        return made


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, the libraries' warnings and their logs stay off the terminal."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    before = [one.level for one in loggers]
    try:
        for one in loggers:
            one.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(loggers, before, strict=True):
            one.setLevel(level)
