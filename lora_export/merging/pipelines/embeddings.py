"""Textual inversion merged: rows appended to a token embedding, and as many tokens to the tokenizer beside it.

A row replaces nothing that a prompt could reach: its id is the next that the tokenizer gives. Where the embedding
has unused rows behind the tokenizer's last id, as T5's, those are taken first.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lora_export.adapters.diffusion.vectors import Vectors, vectors_of
from lora_export.adapters.kind import AdapterFile
from lora_export.adapters.tokens import RowsUpdate
from lora_export.contracts import Component, DiffusionAdapter, MergeOptions, Pipeline, TargetUpdate
from lora_export.errors import AdapterError
from lora_export.merging.pipelines.tokenizers import Tokenizer, extended_files, open_tokenizer
from lora_export.merging.planning.plan import MergePlan

KIND = "textual_inversion"
_EMBEDDINGS = (".token_embedding.weight", "shared.weight", "encoder.embed_tokens.weight")
_LEGACY_END = 2  # with this eos_token_id transformers takes the largest id of a text for its end

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]


@dataclass
class NewTokens:
    """The tokens that adapters bring, one adapter after another. added: component → tokens, in the order of ids."""

    pipeline: Pipeline
    shapes: Shapes
    added: dict[str, list[str]] = field(default_factory=dict)
    tokenizers: dict[str, Tokenizer] = field(default_factory=dict)

    def take(
        self, file: AdapterFile, adapter: DiffusionAdapter, options: MergeOptions
    ) -> dict[str, list[TargetUpdate]]:
        """The updates of each component's token embedding. AdapterError for vectors that have no place in it.

        A weight scales the LoRA beside such vectors; they themselves are taken whole, as prompts use them.
        """
        if adapter.vectors and options.combine != "none":
            raise file.refuse(
                f"--combine {options.combine}, and vectors of textual inversion are no deltas",
                tensor=adapter.vectors[0],
                expected="adapters that change weights",
                next_step="merge the adapter with vectors first, without --combine, and the others into the result",
            )
        if adapter.vectors and not adapter.modules:
            file.refuse_weight("a vector of textual inversion")
        updates: dict[str, list[TargetUpdate]] = {}
        seen: dict[str, set[str]] = {}
        for vectors in vectors_of(file, adapter.vectors):
            component = self._component(file, vectors)
            name = component.name
            if not seen.setdefault(name, set()).isdisjoint(vectors.tokens):
                raise self._known(file, vectors, next(iter(seen[name] & set(vectors.tokens))), name)
            seen[name] |= set(vectors.tokens)
            updates.setdefault(name, []).append(self._update(file, vectors, component))
        return updates

    def config(self, component: str) -> dict[str, Any]:
        """What changes in a text encoder's config.json besides its vocab_size.

        Older files of CLIP have eos_token_id 2, and transformers then takes the largest id of a text for its end,
        which a new token would be.
        """
        of = self.pipeline.components[component]
        tokenizer = self.tokenizers.get(component)
        if tokenizer is None or of.config.get("eos_token_id") != _LEGACY_END or not _is_clip(of):
            return {}
        return {} if tokenizer.end in (None, _LEGACY_END) else {"eos_token_id": tokenizer.end}

    def planned(self, component: str, plan: MergePlan) -> MergePlan:
        """The plan of a component with what its tokens change in its config.json. AdapterError where the plan has
        no row for a token."""
        for name, tensor in plan.tensors.items():
            last = max((i for u in tensor.updates for i in u.tokens), default=-1)
            if last >= tensor.height or (tensor.shape and last >= plan.config_changes.get("vocab_size", last + 1)):
                raise AdapterError(
                    f"the token {last} has no row in the merged model",
                    where=self.pipeline.folder / component,
                    tensor=name,
                    expected=f"a text encoder whose vocabulary can grow, not {tensor.height} rows",
                    next_step="use the embedding unmerged, with load_textual_inversion of diffusers",
                )
        return replace(plan, config_changes={**plan.config_changes, **self.config(component)})

    def warnings(self, components: Collection[str]) -> list[str]:
        """What a prompt can say from now on, and what changes beside the rows."""
        texts = []
        for name, tokens in self.added.items():
            if name in components:
                one = f"the token {tokens[0]}" if len(tokens) == 1 else f"the tokens {', '.join(tokens)}"
                texts.append(f"{name} and its tokenizer know {one} from now on")
                if end := self.config(name).get("eos_token_id"):
                    texts.append(
                        f"{name}: eos_token_id becomes {end}: with {_LEGACY_END}, transformers takes the largest "
                        "id of a text for its end, which would be a new token"
                    )
        return texts

    def ids(self, components: Collection[str]) -> dict[str, dict[str, int]]:
        """Component → token → id, of these components."""
        return {
            name: {token: len(self.tokenizers[name].ids) + at for at, token in enumerate(tokens)}
            for name, tokens in self.added.items()
            if name in components
        }

    def files(self, components: Collection[str]) -> dict[str, bytes]:
        """Path in the pipeline → contents, of the tokenizers' files that change with these components."""
        return {
            f"{tokenizer.folder.name}/{path}": raw
            for name, tokenizer in self.tokenizers.items()
            if name in components
            for path, raw in extended_files(tokenizer, self.added[name]).items()
        }

    def _component(self, file: AdapterFile, vectors: Vectors) -> Component:
        width = file.tensors[vectors.key].shape[-1]
        encoders = [c for n, c in self.pipeline.components.items() if n.startswith("text_encoder")]
        if not encoders:
            raise file.refuse(
                "vectors of textual inversion, and the base has no text encoder",
                tensor=vectors.key,
                expected="the whole pipeline",
                next_step="-b PIPELINE, the folder with model_index.json",
            )
        meant = [c for c in encoders if self._is_meant(c, vectors)]
        fitting = [c for c in meant if self._width(c) == width]
        if len(fitting) == 1:
            return fitting[0]
        widths = ", ".join(f"{c.name} {self._width(c) or 'has no token embedding'}" for c in encoders)
        if fitting:
            raise file.refuse(
                f"vectors of width {width}, which {' and '.join(c.name for c in fitting)} both have",
                tensor=vectors.key,
                expected="tensors called clip_l, clip_g or t5",
                next_step="rename the tensor in a copy of the file",
            )
        raise file.refuse(
            f"vectors of width {width} for {vectors.encoder or 'a text encoder'}, and no such encoder is that wide",
            tensor=vectors.key,
            expected=f"one of the pipeline's widths: {widths}",
            next_step="give the pipeline that they were trained with",
        )

    def _is_meant(self, component: Component, vectors: Vectors) -> bool:
        """By its name, or its number: CLIP-L is the first encoder, CLIP-G the second, T5 is T5."""
        if vectors.number is not None:
            return component.name == f"text_encoder{f'_{vectors.number + 1}' if vectors.number else ''}"
        if vectors.encoder is None:
            return True
        if vectors.encoder == "t5":
            return "T5" in component.class_name
        return (
            _is_clip(component)
            and component.name == {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}[vectors.encoder]
        )

    def _embedding(self, component: Component) -> str | None:
        names = [n for n in self.shapes[component.name] if f".{n}".endswith(_EMBEDDINGS)]
        return names[0] if names else None

    def _width(self, component: Component) -> int | None:
        name = self._embedding(component)
        return self.shapes[component.name][name][-1] if name else None

    def _tokenizer(self, component: str) -> Tokenizer:
        if component not in self.tokenizers:
            name = component.replace("text_encoder", "tokenizer")
            folder = self.pipeline.folder / name
            if name not in self.pipeline.others or not folder.is_dir():
                raise AdapterError(
                    f"{component} has no tokenizer beside it, which new tokens need",
                    where=self.pipeline.folder,
                    expected=f"the folder {name}",
                )
            self.tokenizers[component] = open_tokenizer(folder)
        return self.tokenizers[component]

    def _update(self, file: AdapterFile, vectors: Vectors, component: Component) -> TargetUpdate:
        target = self._embedding(component)
        assert target is not None
        rows, width = self.shapes[component.name][target]
        tokenizer, added = self._tokenizer(component.name), self.added.setdefault(component.name, [])
        for token in vectors.tokens:
            if token in tokenizer.ids or token in added:
                raise self._known(file, vectors, token, component.name)
        first = len(tokenizer.ids) + len(added)
        if len(tokenizer.ids) > rows:
            raise AdapterError(
                f"the tokenizer has {len(tokenizer.ids)} tokens, and the embedding {rows} rows",
                where=tokenizer.folder,
                tensor=target,
                expected="a row for each token",
            )
        ids = tuple(range(first, first + len(vectors.tokens)))
        added += vectors.tokens

        def load(shape: tuple[int, ...]) -> RowsUpdate:
            return RowsUpdate(ids, file.read(vectors.key).reshape(len(ids), width))

        return TargetUpdate(target, KIND, (vectors.key,), ((None, width),), load, tied=True, tokens=ids)

    def _known(self, file: AdapterFile, vectors: Vectors, token: str, component: str) -> AdapterError:
        return file.refuse(
            f"the tokenizer of {component} has the token {token!r} already",
            tensor=vectors.key,
            expected="a token that is new",
            next_step="rename the embedding: a file's name, or the token in the tensor's name, is what prompts say",
        )


def _is_clip(component: Component) -> bool:
    return component.class_name.startswith("CLIP")
