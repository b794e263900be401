"""``compare --executor ray``: the steps of the runs as tasks of a Ray cluster, over a folder that all nodes share.

Ray places a task on a node with free cores and GPUs, and detects lost nodes. A task starts the step's process as on one
machine (`processes.start`) and returns its exit code. All results, outcomes and logs are in the comparison's folder, so
that the same command continues after the driver has died.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.comparison import processes
from rankwise.comparison.stages import beside
from rankwise.compat.ray import print_no_raylet_logs
from rankwise.errors import RunError
from rankwise.foreign import JsonObject

POLL_SECONDS = 0.2
STOP_SECONDS = 120.0
# Timeout for the connection to the cluster's head node.
ANSWER_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A connected cluster. ``needs``: the cores and GPUs of a step; ``places``: how many steps run at a time."""

    needs: Mapping[str, float]
    places: int

    def start(self, module: str, arguments: Sequence[str], name: Path, environment: Mapping[str, str]) -> RayWorker:
        """Run `processes.start` on the node that Ray chooses."""
        import ray

        # Ray does not repeat a lost step: the runner starts it again, from its last checkpoint.
        task = ray.remote(max_retries=0, **self.needs)(_step)
        reference = task.remote(module, list(arguments), str(name), dict(environment), os.getcwd())
        return RayWorker(reference, time.monotonic(), beside(name, ".out"))


@dataclasses.dataclass
class RayWorker:
    """A step on the cluster, with the interface of `processes.Worker`."""

    reference: Any
    started: float
    stdout: Path

    def poll(self) -> int | None:
        """The exit code, None while the step waits or runs, LOST if its node is gone.

        Raises RunError (RW556) where a node cannot see the comparison's folder.
        """
        import ray
        from ray import exceptions

        if not ray.wait([self.reference], timeout=0)[0]:
            return None
        try:
            return int(ray.get(self.reference))
        except exceptions.TaskCancelledError:
            return -signal.SIGINT
        except exceptions.RayTaskError as error:
            raise RunError("RW556", f"{str(error.cause) or error}.") from None
        except exceptions.RayError:
            return processes.LOST

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def stop(self) -> None:
        """Ask the step to save and exit, as Ctrl-C would."""
        import ray

        ray.cancel(self.reference)

    def document(self) -> JsonObject:
        return processes.document_in(self.stdout)


def connect(address: str | None, device: str) -> Cluster:
    """Join the running cluster at ``address`` (default: RAY_ADDRESS, else the one on this machine).

    A step takes one GPU and its share of the node's cores; on a cluster without GPUs, or with ``device`` "cpu", it
    takes all cores of the smallest node. Raises RunError (RW555) without Ray or without a cluster.
    """
    # Disables Ray's telemetry.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise RunError("RW555", "--executor ray needs Ray; install it: pip install 'rankwise[cluster]'.") from None
    try:
        address = address or os.environ.get("RAY_ADDRESS")
        if address is not None and (port := address.rpartition(":")[2]).isdecimal():
            # Ray itself would retry for minutes.
            socket.create_connection((address.rpartition(":")[0], int(port)), ANSWER_SECONDS).close()
        print_no_raylet_logs()
        ray.init(address or "auto", log_to_driver=False, ignore_reinit_error=True)
    except (OSError, ValueError, RuntimeError) as error:
        at = f"at {address}" if address else "on this machine"
        reason = str(error).splitlines()[0]
        raise RunError("RW555", f"no Ray cluster answers {at} ({reason}); start one: ray start --head.") from None
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if not nodes:
        raise RunError("RW555", "no node of the Ray cluster has cores; start one: ray start --address ADDRESS.")
    cards = [node for node in nodes if node.get("GPU")] if device != "cpu" else []
    if cards:
        needs = {"num_gpus": 1.0, "num_cpus": min(max(1.0, node["CPU"] // node["GPU"]) for node in cards)}
        return Cluster(needs, int(sum(node["GPU"] for node in cards)))
    cores = min(node["CPU"] for node in nodes)
    return Cluster({"num_cpus": cores}, int(sum(node["CPU"] // cores for node in nodes)))


def _step(module: str, arguments: list[str], name: str, environment: dict[str, str], folder: str) -> int:
    """Run one step on this node and return its exit code. Cancelling the task interrupts the step as Ctrl-C does."""
    place = Path(folder, name)
    if not place.parent.is_dir():
        raise FileNotFoundError(
            f"the node {socket.gethostname()} cannot see {place.parent}; give --output on a file system that all "
            "nodes share, under the same path"
        )
    os.chdir(folder)
    worker = processes.start(module, arguments, Path(name), environment)
    try:
        while (code := worker.poll()) is None:
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        worker.stop()
        code = worker.process.wait(STOP_SECONDS)
    return code
