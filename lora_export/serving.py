"""Another adapter in a process that serves a model, without a restart and without a request that fails.

Two ways, each measured by tools/bench_switch.py:

* `Plugged`: a graph with slots (`lora-export export -a …`) takes an .onnx_adapter with each run. Requests with
  different adapters can run at the same time, and each costs what an unmerged LoRA costs.
* `Swapped`: another merged export is opened beside the one that serves, and takes over when it is ready. Requests
  run at full speed, and for a moment both models are in memory.

Both may be used by several threads. `run` takes and gives what `InferenceSession.run` does.
"""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.errors import InputError
from lora_export.runtime import open_session, resolve_provider

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime

Feeds = Mapping[str, "np.ndarray[Any, Any]"]


class Plugged:
    """A graph with slots, and adapters by name. A run without an adapter is the base."""

    def __init__(self, folder: Path, provider: str = "auto") -> None:
        self.folder: Path = folder
        self.session: Any = open_session(_graph(folder), resolve_provider(provider))
        if not any("lora" in i.name for i in self.session.get_overridable_initializers()):
            raise InputError(
                "the graph has no slots for adapters",
                where=folder,
                expected="an export with adapters beside it",
                next_step="lora-export export -m BASE -a ADAPTER -o OUT",
            )
        self._adapters: dict[str, Any] = {}
        for file in sorted(folder.glob("*.onnx_adapter")):
            self.add(file.stem, file)

    @property
    def adapters(self) -> list[str]:
        return sorted(self._adapters)

    def add(self, name: str, file: Path) -> None:
        """Take an .onnx_adapter, or another one under a name that is known; runs that began keep theirs."""
        import onnxruntime

        if not file.is_file():
            raise InputError("there is no such adapter", where=file, expected="an .onnx_adapter of this base")
        adapter = onnxruntime.LoraAdapter()
        adapter.Load(str(file))
        self._adapters[name] = adapter

    def run(self, outputs: Sequence[str] | None, feeds: Feeds, adapter: str | None = None) -> list[Any]:
        """InputError for an adapter that was not added."""
        import onnxruntime

        options = onnxruntime.RunOptions()
        if adapter is not None:
            if adapter not in self._adapters:
                known = ", ".join(self.adapters) or "one that was added"
                raise InputError(f"there is no adapter {adapter!r}", where=self.folder, expected=known)
            options.add_active_adapter(self._adapters[adapter])
        return list(self.session.run(outputs, dict(feeds), options))


class Swapped:
    """A merged export, and the next one opened beside it."""

    def __init__(self, folder: Path, provider: str = "auto") -> None:
        self.folder: Path = folder
        self._provider = resolve_provider(provider)
        self.session: Any = open_session(_graph(folder), self._provider)
        self._switching = threading.Lock()

    def switch(self, folder: Path) -> None:
        """Open another export and let it serve. Runs that began end on the old one, which is then let go.

        Any export whose inputs and outputs are the same will do; InputError for another.
        """
        with self._switching:
            following = open_session(_graph(folder), self._provider)
            if _signature(following) != _signature(self.session):
                raise InputError(
                    "the graph has other inputs or outputs than the one that serves",
                    where=folder,
                    expected="an export of the same base in the same precision",
                )
            self.session, self.folder = following, folder

    def run(self, outputs: Sequence[str] | None, feeds: Feeds) -> list[Any]:
        session = self.session
        return list(session.run(outputs, dict(feeds)))


def _signature(session: "onnxruntime.InferenceSession") -> list[tuple[str, str, str]]:
    ends = (*session.get_inputs(), *session.get_outputs())
    return [(end.name, end.type, str(end.shape)) for end in ends]


def _graph(folder: Path) -> Path:
    """The only graph of an export, checked. InputError for models of several graphs."""
    from lora_export.onnx_export import check_model, model_files

    graphs = model_files(folder)
    if len(graphs) != 1:
        raise InputError(
            f"the model has {len(graphs)} graphs", where=folder, expected="one graph: a decoder, or an encoder"
        )
    check_model(graphs[0])
    return graphs[0]
