"""Ordered work in processes: item k of a dataset, for every k asked for, in that order, some items ahead.

The workers come from a fork server: a rank runs gloo's, autograd's and the progress bar's threads, and a plain fork
copies whatever locks those hold, to be waited for for ever. A spawned worker would be as safe, but each imports torch
and transformers anew; the server imports them once per rank and forks from its single thread. (First item of 2 workers
on 2 idle cores: fork 0.03 s, fork server 1.5 s, spawn 1.9 s, and the fork server's cost does not grow with workers.)

An exception a user can fix crosses the process border as a value, so that it arrives as itself, without torch's
wrapping of the worker's traceback into its text.

Hazard: torch passes every tensor of an item as a file descriptor of its own, and a step of some hundred micro-batches
exceeds the usual limit of 1,024; the rank then waits for ever. So an item crosses as plain bytes.
"""

import multiprocessing
import pickle
import re
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Generic, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from megatron_vlm.errors import DataError, MegatronVlmError
from megatron_vlm.runtime.signals import end_with_parent, kept_from_children

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
PREFETCHED_ITEMS = 2  # per worker
_DEAD_WORKER = re.compile(r"DataLoader worker .*(killed by signal|exited unexpectedly)")


class Producer(Protocol[T_co]):
    """Makes item `number`; it is pickled once to each worker."""

    def produce(self, number: int) -> T_co: ...


@dataclass(frozen=True)
class Failure:
    """An error on its way from a worker."""

    error: MegatronVlmError


class _Items(Dataset):
    """A producer as torch's loader wants it."""

    def __init__(self, producer: Producer) -> None:
        self.producer = producer

    def __getitem__(self, number: int) -> object:
        try:
            item: object = self.producer.produce(number)
        except MegatronVlmError as error:
            item = Failure(error)
        return item if get_worker_info() is None else pickle.dumps(item)


class OrderedItems(Generic[T]):
    """The producer's items `numbers`, in that order, each pass anew.

    Args:
        producer: picklable where there are workers.
        numbers: the items wanted.
        num_workers: processes; 0 makes each item when it is asked for, in this process.

    Raises:
        MegatronVlmError: from iterating, what the producer raised for that item.
        DataError: from iterating, where a worker was killed.
    """

    def __init__(self, producer: Producer[T], numbers: Sequence[int], num_workers: int) -> None:
        self.numbers, self.producer = numbers, producer
        if num_workers:
            multiprocessing.set_forkserver_preload(["__main__", type(producer).__module__])
        self._loader: DataLoader = DataLoader(
            _Items(producer),
            batch_size=None,
            sampler=numbers,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            multiprocessing_context=multiprocessing.get_context("forkserver") if num_workers else None,
            worker_init_fn=_end_with_the_rank,
            prefetch_factor=PREFETCHED_ITEMS if num_workers else None,
            generator=torch.Generator(),  # its own: starting a pass draws from it, not from the model's random state
        )

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[T]:
        with kept_from_children(with_tracker=self._loader.num_workers > 0):  # a signal to save ends no worker
            stream = iter(self._loader)
        for worker in getattr(stream, "_workers", ()):
            weakref.finalize(stream, _kill, worker)  # at this process's end at the latest
        try:
            for made in stream:
                item = pickle.loads(made) if self._loader.num_workers else made
                if isinstance(item, Failure):
                    raise item.error
                yield item
        except RuntimeError as error:
            if not _DEAD_WORKER.search(str(error)):
                raise
            reason = " ".join(str(error).split())
            raise DataError(f"{reason} (data.num_workers: {self._loader.num_workers}; was the memory full?)") from error
        finally:
            # The error's traceback makes this frame part of a cycle. Were the stream collected with it, torch's queues
            # would be closed before it could tell the workers to end, and it would wait 5 s for each.
            del stream


def _kill(worker: BaseProcess) -> None:
    """Ends a worker that was not told to end. torch and multiprocessing would do it by SIGTERM, which workers do not
    get, and then wait for it for ever."""
    if worker.is_alive():
        worker.kill()


def _end_with_the_rank(_worker: int) -> None:
    """torch's own watch looks for a change of parent, but a worker's parent is the fork server, which lives as long as
    its workers do: after a rank was killed, both would stay for ever."""
    end_with_parent()


def _as_it_is(item: T) -> T:
    return item
