"""A Ray cluster of several raylets on this machine, whose processes can be killed one by one."""

import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

_STORE = 75 * 2**20


class Raylets:
    """The first raylet has the head's processes beside it. Only this program may connect, by `variables`."""

    def __init__(self, cluster: Any, variables: dict[str, str], port: int) -> None:
        self.cluster, self.variables, self.client = cluster, variables, f"ray://127.0.0.1:{port}"

    def add(self) -> None:
        self.cluster.add_node(num_cpus=1, object_store_memory=_STORE, include_log_monitor=False)

    def kill(self, number: int) -> int:
        """SIGKILL for the raylet of a node that is not the head; its process number."""
        node = sorted(self.cluster.worker_nodes, key=id)[number]
        pid: int = node.all_processes["raylet"][0].process.pid
        os.kill(pid, 9)
        self.cluster.remove_node(node, allow_graceful=False)
        return pid

    @property
    def others(self) -> int:
        return len(self.cluster.worker_nodes)


@contextmanager
def raylets(count: int) -> Iterator[Raylets]:
    variables = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_worker_prestart": "0",
    }
    before = dict(os.environ)
    os.environ.update(variables)
    from ray.cluster_utils import Cluster

    port = _free_port()
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "include_dashboard": False,
            "object_store_memory": _STORE,
            "ray_client_server_port": port,
        },
    )
    try:
        there = Raylets(cluster, variables | {"RAY_ADDRESS": cluster.address}, port)
        for _ in range(count - 1):
            there.add()
        yield there
    finally:
        cluster.shutdown()
        os.environ.clear()
        os.environ.update(before)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def workers() -> list[psutil.Process]:
    """Processes of workers on the cluster that RAY_AUTH_TOKEN opens; other people's are not looked at."""
    return [p for p in psutil.process_iter() if _is_worker(p)]


def _is_worker(process: psutil.Process) -> bool:
    try:
        named = "ray::RayWorker" in " ".join(process.cmdline())
        return named and process.environ().get("RAY_AUTH_TOKEN") == os.environ.get("RAY_AUTH_TOKEN")
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def gone(processes: list[psutil.Process], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes):
            return True
        time.sleep(0.1)
    return False
