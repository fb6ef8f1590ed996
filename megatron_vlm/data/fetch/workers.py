"""Ordered work in processes: item k of a dataset, for every k asked for, in that order, some items ahead.

The workers come from a fork server: a rank runs gloo's, autograd's and the progress bar's threads, and a plain fork
copies whatever locks those hold, to be waited for for ever. A spawned worker would be as safe, but each imports torch
and transformers anew; the server imports them once per rank and forks from its single thread. (First item of 2 workers
on 2 idle cores: fork 0.03 s, fork server 1.5 s, spawn 1.9 s, and the fork server's cost does not grow with workers.)
Where a run forks the server itself early (`runtime/fork_server.py`), that is 0.05 s too.

An exception a user can fix crosses the process border as a value, so that it arrives as itself, without torch's
wrapping of the worker's traceback into its text.

Hazard: torch passes every tensor of an item as a file descriptor of its own, and a step of some hundred micro-batches
exceeds the usual limit of 1,024; the rank then waits for ever. So an item crosses as plain bytes.

Those bytes are read and unpickled by a thread of the rank, one item ahead, while the caller works on the last one.
torch's own thread for that (`pin_memory`) would do it on CUDA only, and keep all items that were prefetched.
"""

import atexit
import multiprocessing
import pickle
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from queue import Empty, SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from megatron_vlm.errors import DataError, MegatronVlmError, one_line
from megatron_vlm.runtime.position import HERE, Record
from megatron_vlm.runtime.signals import BeginAsChild, kept_from_children

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
PREFETCHED_ITEMS = 2  # per worker
POLL_SECONDS = 0.1  # between two looks of the reading thread at whether it is still wanted
WATCH_SECONDS = 1.0  # between two looks of the waiting caller at the workers
END_SECONDS = 5.0  # at most, for the thread to end
_NOT_YET = re.compile(r"DataLoader timed out")
_DEAD_WORKER = re.compile(r"DataLoader worker .*(killed by signal|exited unexpectedly)")


class Producer(Protocol[T_co]):
    """Makes item `number`; it is pickled once to each worker."""

    def produce(self, number: int) -> T_co: ...


@dataclass(frozen=True)
class Failure:
    """An error on its way from a worker, or from the thread that reads."""

    error: BaseException


class _Items(Dataset):
    """A producer as torch's loader wants it. `record`: where each worker, by its number, writes which sample it is
    at."""

    def __init__(self, producer: Producer, num_workers: int) -> None:
        self.producer = producer
        self.record = Record(max(1, num_workers))

    def __getitem__(self, number: int) -> object:
        worker = get_worker_info()
        if worker is not None:
            HERE.write_to(self.record.number(worker.id))
        try:
            item: object = self.producer.produce(number)
        except MegatronVlmError as error:
            item = Failure(error)
        except (Exception, KeyboardInterrupt):
            raise
        except BaseException as error:  # of a library: a panic in Rust, or it called sys.exit; a worker would just end
            raise RuntimeError(f"item {number} ended in a {type(error).__name__}: {one_line(error)}") from error
        HERE.sample(None)
        return item if worker is None else pickle.dumps(item)


class OrderedItems(Generic[T]):
    """The producer's items `numbers`, in that order, each pass anew.

    Args:
        producer: picklable where there are workers.
        numbers: the items wanted.
        num_workers: processes; 0 makes each item when it is asked for, in this process and thread.
        prepare: makes of each item the one that is given, in the thread that reads them; left out without workers.

    Raises:
        MegatronVlmError: from iterating, what the producer raised for that item.
        DataError: from iterating, where a worker was killed.
    """

    def __init__(
        self,
        producer: Producer[T],
        numbers: Sequence[int],
        num_workers: int,
        prepare: Callable[[T], T] | None = None,
    ) -> None:
        self.numbers, self.producer, self.prepare = numbers, producer, prepare
        if num_workers:
            multiprocessing.set_forkserver_preload(["__main__", type(producer).__module__])
        self._items = _Items(producer, num_workers)
        self._loader: DataLoader = DataLoader(
            self._items,
            batch_size=None,
            sampler=numbers,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            multiprocessing_context=multiprocessing.get_context("forkserver") if num_workers else None,
            prefetch_factor=PREFETCHED_ITEMS if num_workers else None,
            timeout=POLL_SECONDS if num_workers else 0,
            generator=torch.Generator(),  # its own: starting a pass draws from it, not from the model's random state
        )

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[T]:
        if self._loader.num_workers:
            yield from self._one_ahead()
            return
        for item in self._loader:
            yield _opened(item)

    def _one_ahead(self) -> Iterator[T]:
        self._loader.worker_init_fn = BeginAsChild()  # torch watches a worker's parent, the server, for its end
        with kept_from_children(with_tracker=True):  # a signal to save ends no worker
            stream: Any = iter(self._loader)
        for worker in stream._workers:
            weakref.finalize(stream, _kill, worker)  # at this process's end at the latest
        reader: _Reader[T] = _Reader(stream, self.prepare)
        atexit.register(reader.end)  # a daemon that runs while Python is taken down can crash it
        try:
            reader.start()
            reader.ask()
            for number in range(1, len(self) + 1):
                item = _opened(reader.take(self._items.record.number((number - 1) % self._loader.num_workers)))
                if number < len(self):
                    reader.ask()
                yield item
        except RuntimeError as error:
            if not _DEAD_WORKER.search(str(error)):
                raise
            raise DataError(
                f"{one_line(error)} (data.num_workers: {self._loader.num_workers}; was the memory full?)"
            ) from error
        finally:
            try:
                reader.end()
            finally:
                atexit.unregister(reader.end)
                # Not left to the collection of the stream, which an error's traceback holds: in a cycle, torch's queues
                # could be closed before it tells the workers to end, and it would wait 5 s for each.
                stream._shutdown_workers()


class _Reader(threading.Thread, Generic[T]):
    """Takes an item from the workers each time it is asked to; until it has ended, nobody else touches the stream.

    It never waits for a worker longer than POLL_SECONDS at a time: torch's loader then raises and can be asked anew.
    Only a worker killed while it sends leaves it waiting for the rest of the item, for ever; hence a daemon thread, and
    a caller that watches the workers.
    """

    def __init__(self, stream: Any, prepare: Callable[[T], T] | None) -> None:
        super().__init__(name="next item", daemon=True)
        self._stream, self._prepare = stream, prepare
        self._asked: SimpleQueue[bool] = SimpleQueue()
        self._made: SimpleQueue[T | Failure] = SimpleQueue()
        self._ends = threading.Event()

    def run(self) -> None:
        while self._asked.get():
            self._made.put(self._make())

    def ask(self) -> None:
        """Has one more item made."""
        self._asked.put(True)

    def take(self, maker: Record) -> T | Failure:
        """Waits for the item that was asked for, or what was raised instead; signals are handled meanwhile, and where
        the worker is that makes it is told as this process's place."""
        died = False
        while True:
            try:
                return self._made.get(timeout=WATCH_SECONDS)
            except Empty:
                HERE.sample(maker.read().sample)
                if died:
                    return Failure(RuntimeError("DataLoader worker exited unexpectedly, in the middle of an item"))
                died = not (self.is_alive() and all(worker.is_alive() for worker in self._stream._workers))

    def end(self) -> None:
        """Ends the thread, whatever it waits for. Can be called again."""
        self._ends.set()
        self._asked.put(False)
        if self.is_alive() and self is not threading.current_thread():  # which may be collecting an abandoned pass
            self.join(END_SECONDS)

    def _make(self) -> T | Failure:
        try:
            item = pickle.loads(self._read())
            return item if self._prepare is None or isinstance(item, Failure) else self._prepare(item)
        except BaseException as error:
            return Failure(error)

    def _read(self) -> bytes:
        while True:
            try:
                return next(self._stream)
            except RuntimeError as error:
                if self._ends.is_set() or not _NOT_YET.match(str(error)):
                    raise


def _opened(item: T | Failure) -> T:
    """The item. Raises what was raised instead of one."""
    if isinstance(item, Failure):
        raise item.error
    return item


def _kill(worker: BaseProcess) -> None:
    """Ends a worker that was not told to end. torch and multiprocessing would do it by SIGTERM, which workers do not
    get, and then wait for it for ever."""
    if worker.is_alive():
        worker.kill()


def _as_it_is(item: T) -> T:
    return item
