"""Text in, text out: a decoder with its tokenizer under Triton's Python backend, decoupled.

Requests take turns, a token at a time, so a long text does not hold up a short one. They are not batched with each
other. At most ACTIVE have a cache at a time; others wait.
"""

import collections
import math
import queue
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_session
import onnxruntime
import tokenizers
import triton_python_backend_utils as triton

ACTIVE = 8
MOST_TOKENS = 16  # where a request does not say
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what the first bytes of a character are decoded to
_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        home = Path(args["model_repository"])
        graph = home.parent / onnx_session.parameter(args, "graph")
        on_gpu = args["model_instance_kind"] == "GPU"
        device = ("cuda", int(args["model_instance_device_id"])) if on_gpu else ("cpu", 0)
        self.decoder = Decoder(onnx_session.opened(args, graph), *device)
        self.tokenizer = tokenizers.Tokenizer.from_file(str(home / args["model_version"] / "tokenizer.json"))
        self.ends = frozenset(map(int, onnx_session.parameter(args, "end_tokens").split()))
        self.longest = int(onnx_session.parameter(args, "context_length") or 2**31)
        self.arrived: queue.SimpleQueue[Text | None] = queue.SimpleQueue()
        self.worker = threading.Thread(target=self._work, daemon=True)
        self.worker.start()

    def execute(self, requests: Sequence[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                self.arrived.put(Text(sender, Settings(request), self.tokenizer, self.longest))
            except ValueError as error:
                refuse(sender, str(error))

    def finalize(self) -> None:
        self.arrived.put(None)
        self.worker.join()

    def _work(self) -> None:
        """Take turns among the texts that are being written."""
        waiting: collections.deque[Text] = collections.deque()
        while True:
            while not waiting or not self.arrived.empty():
                text = self.arrived.get()
                if text is None:
                    for text in waiting:
                        refuse(text.sender, "the server is stopping", "UNAVAILABLE")
                    return
                waiting.append(text)
            active = [waiting.popleft() for _ in range(min(ACTIVE, len(waiting)))]
            waiting.extendleft(reversed([text for text in active if self._goes_on(text)]))

    def _goes_on(self, text: "Text") -> bool:
        """Write one more token of a text; whether another follows."""
        try:
            if text.sender.is_cancelled():
                triton.Logger.log_info(f"cancelled after {len(text.said)} of {text.most} tokens")
                refuse(text.sender, "the client cancelled the request", "CANCELLED")
                return False
            token = text.settings.choose(self.decoder.step(text))
            if token not in self.ends:
                text.said.append(token)
            over = token in self.ends or len(text.said) >= text.most
            text.send(over)
            return not over
        except Exception as error:  # told to this client; other texts go on
            refuse(text.sender, f"{type(error).__name__}: {error}", "INTERNAL")
            return False


def refuse(sender: Any, words: str, code: str = "INVALID_ARG") -> None:
    """End a request with an error. The server adds its error class after it has imported this file."""
    response = triton.InferenceResponse(error=triton.TritonError(words, getattr(triton.TritonError, code)))
    sender.send(response, flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


class Settings:
    """What a request asks for. ValueError for a value that no text can be written with."""

    def __init__(self, request: Any) -> None:
        def given(name: str, default: Any) -> Any:
            tensor = triton.get_input_tensor_by_name(request, name)
            return default if tensor is None else tensor.as_numpy().flatten()[0]

        try:
            text = given("text_input", None)
            self.prompt: str = "" if text is None else text.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError("text_input is not UTF-8") from None
        self.tokens = int(given("max_tokens", MOST_TOKENS))
        self.stream = bool(given("stream", False))
        self.temperature = float(given("temperature", 0.0))
        self.top_k, self.top_p = int(given("top_k", 0)), float(given("top_p", 1.0))
        seed = given("seed", None)
        for name, value, holds, expected in (
            ("max_tokens", self.tokens, self.tokens > 0, "at least 1"),
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 (greedy) or a positive number"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1"),
            ("seed", seed, seed is None or seed >= 0, "0 or more"),
        ):
            if not holds:
                raise ValueError(f"{name} is {value}; expected: {expected}")
        self.random = np.random.default_rng(None if seed is None else int(seed))

    def choose(self, logits: "np.ndarray[Any, Any]") -> int:
        """The next token: the likeliest, or drawn after temperature, top_k and top_p, in this order."""
        if not np.isfinite(logits).all():
            raise ArithmeticError("the model computed a number that is not finite")
        if self.temperature == 0:
            return int(logits.argmax())
        order = np.argsort(-logits, kind="stable")[: self.top_k or None]
        scaled = logits[order].astype(np.float64) / self.temperature
        shares = np.exp(scaled - scaled[0])
        shares /= shares.sum()
        kept = int(np.searchsorted(np.cumsum(shares), self.top_p)) + 1  # the one that crosses top_p included
        shares = shares[:kept] / shares[:kept].sum()
        return int(order[self.random.choice(len(shares), p=shares)])


class Text:
    """One text being written. said: its tokens; states: of the decoder, after all but the last of them."""

    def __init__(self, sender: Any, settings: Settings, tokenizer: "tokenizers.Tokenizer", longest: int) -> None:
        self.sender, self.settings, self.tokenizer = sender, settings, tokenizer
        self.prompt: list[int] = tokenizer.encode(settings.prompt).ids
        if not self.prompt:
            raise ValueError("text_input is missing, or has no tokens")
        if len(self.prompt) >= longest:
            raise ValueError(
                f"text_input has {len(self.prompt)} tokens, and text is at most {longest} with its answer"
            )
        self.most = min(settings.tokens, longest - len(self.prompt))
        self.said: list[int] = []
        self.states: dict[str, Any] = {}
        self._pieces = self._decoded()

    def send(self, over: bool) -> None:
        """What is new, to a client that streams; everything at the end to one that does not."""
        final = triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL if over else 0
        piece = next(self._pieces) if self.settings.stream else ""
        if over:
            piece = self._rest(piece) if self.settings.stream else self._text(self.said)
        if over or piece:
            output = triton.Tensor("text_output", np.array([piece.encode("utf-8")], dtype=np.object_))
            self.sender.send(triton.InferenceResponse([output]), flags=final)

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _decoded(self) -> Iterator[str]:
        """The new text after each token. Tokens are decoded with those of the last piece, on which their spaces
        depend; a character that is not yet whole waits."""
        self._start, self._sent = 0, 0
        while True:
            old = self._text(self.said[self._start : self._sent])
            new = self._text(self.said[self._start :])
            if len(new) <= len(old) or new.endswith(_INCOMPLETE):
                yield ""
                continue
            self._start, self._sent = self._sent, len(self.said)
            yield new[len(old) :]

    def _rest(self, piece: str) -> str:
        """The last piece, with what never became a whole character."""
        old = self._text(self.said[self._start : self._sent])
        return piece + self._text(self.said[self._start :])[len(old) :]


class Decoder:
    """A graph with a cache, whose states stay where the graph runs."""

    def __init__(self, session: "onnxruntime.InferenceSession", device: str, number: int) -> None:
        self.session, self.device, self.number = session, device, number
        self.inputs = {value.name for value in session.get_inputs()}
        self.outputs = [value.name for value in session.get_outputs()]
        self.empty = {v.name: _empty(v) for v in session.get_inputs() if v.name.startswith("past")}

    def step(self, text: Text) -> "np.ndarray[Any, Any]":
        """(vocabulary,) logits of the token after `text`, whose states are then those after its last token."""
        past = len(text.prompt) + len(text.said) - 1 if text.states else 0
        ids = text.said[-1:] if text.states else text.prompt
        feeds = {
            "input_ids": np.array([ids], dtype=np.int64),
            "attention_mask": np.ones((1, past + len(ids)), dtype=np.int64),
            "position_ids": np.arange(past, past + len(ids), dtype=np.int64)[None],
        }
        binding = self.session.io_binding()
        for name, value in (feeds if text.states else feeds | self.empty).items():
            if name in self.inputs:
                binding.bind_cpu_input(name, value)
        for name, state in text.states.items():
            binding.bind_ortvalue_input(name, state)
        for name in self.outputs:
            binding.bind_output(name, *(("cpu",) if name == "logits" else (self.device, self.number)))
        self.session.run_with_iobinding(binding)
        found = dict(zip(self.outputs, binding.get_outputs(), strict=True))
        logits = found.pop("logits").numpy()[0, -1]
        text.states = {_continued(name): state for name, state in found.items()}
        return np.asarray(logits)


def _continued(output: str) -> str:
    """The input that an output is given to at the next step, as exporters name them."""
    if output.endswith((".conv", ".recurrent")):
        return output.replace("present.", "past.")
    return output.replace("present.", "past_key_values.").replace("present_", "past_")


def _empty(value: Any) -> "np.ndarray[Any, Any]":
    """The state before the first token: one row, no tokens, the other sizes as in the graph."""
    sizes = [size if isinstance(size, int) else int("batch" in str(size)) for size in value.shape]
    return np.zeros(sizes, dtype=_NUMPY[value.type])
