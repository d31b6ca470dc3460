"""Several processes at one site that share one piece of work, started by ``torchrun``.

Each process computes some of the blocks and writes them to their places in one file. Nothing but
short messages (a path, an error) travels between them, so gloo serves processes with GPUs as well.
A block is computed alike by whoever gets it: the file has the same bytes for any number of them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, TypeVar

import torch
from torch import distributed

from fedgestalt.errors import FedgestaltError

_PATIENCE = timedelta(hours=12)  # for the slowest process; torchrun ends all when one dies

T = TypeVar("T")


@dataclass(frozen=True)
class Crew:
    """One process among those that share a piece of work.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether it does what is done once."""
        return self.rank == 0

    def share(self, work: Sequence[T]) -> list[T]:
        """What of ``work`` falls to this process."""
        return list(work[self.rank :: self.size])

    def from_leader(self, do: Callable[[], T]) -> T:
        """What ``do`` returns in the leading process, in all of them.

        Raises:
            FedgestaltError: ``do`` raised it; in all of them.
        """
        if self.size == 1:
            return do()
        said: list[tuple[T | None, FedgestaltError | None]] = [(None, None)]
        if self.leads:
            try:
                said = [(do(), None)]
            except FedgestaltError as error:
                said = [(None, error)]
        distributed.broadcast_object_list(said)
        value, failed = said[0]
        if failed:
            raise failed
        return value  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank, in all of them."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Leave the block when all processes have; an error of one is an error of all.

        Raises:
            FedgestaltError: the block raised it in one of them.
        """
        if self.size == 1:
            yield
            return
        failed: FedgestaltError | None = None
        try:
            yield
        except FedgestaltError as error:
            failed = error
        for fault in self.gather(failed):
            if fault:
                raise fault


ALONE: Final = Crew()


def crew_of_this_process() -> Crew:
    """The crew that :func:`join_crew` joined, or one of this process alone."""
    if distributed.is_available() and distributed.is_initialized():
        return Crew(distributed.get_rank(), distributed.get_world_size())
    return ALONE


@contextlib.contextmanager
def join_crew() -> Iterator[Crew]:
    """Work with the processes that ``torchrun`` started, if it did; each on a GPU of its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield crew_of_this_process()
    finally:
        distributed.destroy_process_group()
