"""A Ray cluster that is there, or one of this machine for the time of a fleet: found, started, kept quiet."""

import contextlib
import os
import re
import secrets
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from lora_export.errors import RuntimeUnavailable
from lora_export.fleet.engines.ray_words import first_line

_STORE_BYTES = 75 * 2**20  # Ray's least
# Nothing is spilled, no worker starts before it is needed, and a lost node is noticed within seconds.
_OF_THIS_MACHINE = {
    "automatic_object_spilling_enabled": False,
    "enable_worker_prestart": False,
    "prestart_worker_first_driver": False,
}
_PASSED = frozenset({"PYTHONPATH", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"})
_PREFIX = "LORA_EXPORT_"
_CREDENTIALS = ("AWS_", "AZURE_", "GOOGLE_", "HF_TOKEN")
_SECRET = re.compile("TOKEN|SECRET|PASSWORD|CREDENTIAL|_KEY")


def library() -> Any:
    """Ray, which tells nobody that it is used. RuntimeUnavailable if it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # leaves GPUs visible to every worker
    try:
        import ray
    except ImportError as error:
        raise RuntimeUnavailable(
            f"Ray is not installed here: {first_line(error)}",
            next_step="pip install 'lora-export[fleet]', or --on local",
        ) from error
    return ray


def connect(ray: Any, on: str, workers: int, stack: contextlib.ExitStack) -> bool:
    """Whether the cluster is one of this machine that was started here; it ends with `stack`.

    on: `ray` (RAY_ADDRESS, a cluster that runs on this machine, or a cluster that is started here) or ray://HOST:PORT.
    A program that has connected Ray itself keeps its connection.
    """
    stack.enter_context(_quiet(ray))
    if ray.is_initialized():
        return False
    stack.callback(ray.shutdown)
    common = {"log_to_driver": False, "logging_level": "CRITICAL", "namespace": f"fleet-{secrets.token_hex(8)}"}
    passed = common | {"runtime_env": {"env_vars": dict(passed_variables(os.environ))}}
    try:
        if on != "ray":
            ray.init(on, **passed)
            return False
        with contextlib.suppress(ConnectionError):
            ray.init("auto", **passed)
            return False
        if "RAY_ADDRESS" in os.environ:
            raise ConnectionError(f"nothing runs at RAY_ADDRESS ({os.environ['RAY_ADDRESS']})")
        _own_token()
        ray.init(
            "local", num_cpus=workers, include_dashboard=False, object_store_memory=_STORE_BYTES,
            _system_config=_OF_THIS_MACHINE, **common,
        )  # fmt: skip
    except (ray.exceptions.RayError, ImportError, RuntimeError, ValueError, OSError) as error:
        raise RuntimeUnavailable(
            f"no Ray cluster for --on {on}: {first_line(error)}",
            expected="a cluster that runs, with this Python and this Ray; ray:// takes its client port (10001)",
            next_step="`ray status` there tells whether it runs; RAY_AUTH_MODE=token and RAY_AUTH_TOKEN if it "
            "has a token; --on local needs no cluster",
        ) from error
    return True


def room(ray: Any, workers: int | None) -> tuple[int, int]:
    """Cores of a slot, and the number of slots. workers None: two cores for each, as many as are free."""
    nodes = [cores for n in ray.nodes() if n["Alive"] and (cores := int(n["Resources"].get("CPU", 0)))]
    if not nodes:
        raise RuntimeUnavailable("the Ray cluster has no cores for workers", expected="a node with --num-cpus ≥ 1")
    if workers is None:
        threads = min(2, *nodes)
        free = int(ray.available_resources().get("CPU", 0)) // threads
        return threads, max(1, min(free, sum(n // threads for n in nodes)))
    for threads in range(max(1, sum(nodes) // workers), 0, -1):
        if sum(n // threads for n in nodes) >= workers:
            return threads, workers
    raise RuntimeUnavailable(
        f"--workers {workers}, and the Ray cluster has {sum(nodes)} cores", expected=f"--workers ≤ {sum(nodes)}"
    )


def passed_variables(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What workers on other nodes need before they import anything. Ray logs it: no secret is in it."""
    for name, value in environment.items():
        if name == "PYTHONPATH":
            yield name, os.pathsep.join(os.path.abspath(p) for p in value.split(os.pathsep) if p)  # noqa: PTH100
        elif (name in _PASSED or name.startswith(_PREFIX)) and not _SECRET.search(name):
            yield name, value


def secret_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Credentials of stores and of the Hub, and secrets among this tool's own variables."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(_CREDENTIALS) or (name.startswith(_PREFIX) and _SECRET.search(name))
    }


def _own_token() -> None:
    """A cluster that is started here answers this program only. Without a token Ray would leave one in the home."""
    if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


@contextlib.contextmanager
def _quiet(ray: Any) -> Iterator[None]:
    """Ray prints what its nodes report of dead workers to stdout, with no setting against it, and takes SIGTERM."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if main else None
    inner = getattr(ray._private, "worker", None)
    printing = getattr(inner, "print_to_stdstream", None)
    if printing is not None:
        inner.print_to_stdstream = lambda *_args, **_options: None  # type: ignore[union-attr]
    try:
        yield
    finally:
        if printing is not None:
            inner.print_to_stdstream = printing  # type: ignore[union-attr]
        if main and before is not None:
            signal.signal(signal.SIGTERM, before)
