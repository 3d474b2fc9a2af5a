"""Shards of an embedding written by the actors of Ray Data, on as many machines as the cluster has."""

import copy
import dataclasses
import os
from typing import TYPE_CHECKING, Any

import torch

from lightning_contrast._checks import require

if TYPE_CHECKING:
    from lightning_contrast.evaluation.feature_pass.embedding import EmbeddingJob

_EXTRA = "pip install 'lightning_contrast[ray]'"
_CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


class ShardWriter:
    """Writes shards in an actor; the network and the dataset are sent to it once.

    Args:
        job: Reference of the job in Ray's store, in a list, in which Ray does not resolve it.
        threads: Threads of torch, as in the process that started it: sums of other numbers of threads round otherwise.
    """

    def __init__(self, job: Any, threads: int) -> None:
        import ray

        torch.set_num_threads(threads)
        self.job: EmbeddingJob = ray.get(job[0])
        if torch.cuda.is_available():
            self.job.subject.module.to("cuda")

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Write the shards of a batch of numbers, and return their entries in the manifest."""
        entries = [self.job.write(int(index)) for index in batch["id"]]
        return {name: [entry[name] for entry in entries] for name in ("shard", "file", "rows", "digest")}


def write_on_ray(job: "EmbeddingJob", workers: int) -> list[dict[str, Any]]:
    """Write all shards of a job that are not there, and return the entries of all.

    Args:
        job: The job; network and loader must be picklable.
        workers: Number of actors, >= 1. Each takes a GPU if the cluster has one per actor, else a CPU.

    Raises:
        ModuleNotFoundError: If Ray is not installed; the message names the extra.
        ValueError: If the cluster has fewer CPUs than workers.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ModuleNotFoundError(f"`ray_workers` needs Ray: {_EXTRA}.") from error
    if not ray.is_initialized():
        _connect()
    resources_of: Any = ray.cluster_resources
    resources = resources_of()
    held = int(resources.get("CPU", 0))
    require(workers <= held, "ray_workers", f"be <= {held}, the CPUs of the cluster", workers, "Give fewer")
    gpus = 1 if resources.get("GPU", 0) >= workers else 0
    network = copy.deepcopy(job.subject.module).cpu()  # actors may have no GPU
    reference = ray.put(dataclasses.replace(job, subject=job.subject._replace(module=network)))
    numbers = ray.data.from_items([{"id": index} for index in range(len(job.shards))])
    written = numbers.map_batches(
        ShardWriter,
        fn_constructor_args=([reference], torch.get_num_threads()),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_gpus=gpus,
    )
    return [dict(entry) for entry in written.take_all()]


def _connect() -> None:
    """Connect to the cluster of ``RAY_ADDRESS`` or ``ray start``; without one start Ray, on loopback alone.

    Ray binds its servers to all addresses if the address of the node is not loopback. It replaces loopback, also as an
    argument of `ray.init`, by an address of the network, except where it does not support clusters: on Windows and
    macOS, or as the variable says, for this process and for those that it starts.
    """
    import ray
    from ray._private import ray_constants

    before = os.environ.get(_CLUSTERS), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[_CLUSTERS], ray_constants.ENABLE_RAY_CLUSTER = "0", False  # Ray read the variable at its import
    try:
        ray.init(log_to_driver=False, include_dashboard=False)
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before[1]
        if before[0] is None:
            del os.environ[_CLUSTERS]
        else:
            os.environ[_CLUSTERS] = before[0]
