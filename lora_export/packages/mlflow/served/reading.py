"""Models that read a text: embedders, classifiers, taggers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .graphs import Array
from .models import Model, Refused, rows_of, text_of


class Reader(Model):
    """One graph, from a text to numbers. A text that is too long is cut, as by the libraries of such models."""

    columns: ClassVar[tuple[str, ...]] = ("input",)

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        super().__init__(folder, config)
        self.tokenizer.enable_truncation(self.longest)
        self.reader = self.graph("model.onnx")

    def answers(self, data: Any, params: Mapping[str, Any]) -> list[Any]:
        rows = rows_of(data, self.columns)
        texts = [text_of(row, "input", number) for number, row in enumerate(rows)]
        return [self.answer(text, number) for number, text in enumerate(texts)]

    def answer(self, text: str, number: int = 0) -> Any:
        raise NotImplementedError

    def outputs(self, text: str, number: int = 0) -> dict[str, Array]:
        """Name → output of the graph for one text, in the graph's order, each with a first axis of 1."""
        read = self.tokenizer.encode(text)
        if not read.ids:
            raise Refused(f"row {number} has no tokens")
        masks = {"attention_mask": [read.attention_mask], "token_type_ids": [read.type_ids]}
        return self.reader.run({"input_ids": [read.ids], "position_ids": [range(len(read.ids))], **masks})


class Embedder(Reader):
    """The embedding of a text where the graph computes one; otherwise the states of its tokens."""

    def answer(self, text: str, number: int = 0) -> list[Any]:
        outputs = self.outputs(text, number)
        name = "sentence_embedding" if "sentence_embedding" in outputs else next(iter(outputs))
        return list(outputs[name][0].astype(np.float32).tolist())


class Classifier(Reader):
    """Label → score of a text."""

    def answer(self, text: str, number: int = 0) -> dict[str, float]:
        logits = self.outputs(text, number)["logits"][0].astype(np.float64)
        return labelled(scores(logits, self.settings.get("problem_type")), self.settings)


class Tagger(Reader):
    """The likeliest label of each token, its score, and where the token stands in the text; special ones aside."""

    def answer(self, text: str, number: int = 0) -> list[dict[str, Any]]:
        logits = self.outputs(text, number)["logits"][0].astype(np.float64)
        read, tags = self.tokenizer.encode(text), []
        for numbers, (start, end), special in zip(logits, read.offsets, read.special_tokens_mask, strict=True):
            named = {} if special else labelled(scores(numbers, None), self.settings)
            for label in sorted(named, key=named.__getitem__)[-1:]:
                tags.append({"label": label, "score": named[label], "start": start, "end": end})
        return tags


def scores(logits: Array, problem: str | None) -> Array:
    """logits: (labels). Of a regression, the same numbers; of labels that do not exclude each other, and of a
    single one, each between 0 and 1; otherwise they add up to 1, as in transformers' TextClassificationPipeline."""
    if problem == "regression":
        return logits
    if problem == "multi_label_classification" or len(logits) == 1:
        return np.asarray(1 / (1 + np.exp(-logits)))
    shares = np.exp(logits - logits.max())
    return np.asarray(shares / shares.sum())


def labelled(numbers: Array, settings: Mapping[str, Any]) -> dict[str, float]:
    names = settings.get("id2label") or {}
    return {str(names.get(str(i), f"LABEL_{i}")): float(number) for i, number in enumerate(numbers)}
