"""Talks to the other ranks on a thread and process groups of its own: training never waits here.

The groups are made beside torch's registry, from the store that `init_process_group` left, so that no collective of the
user's can be mixed up with one of ours. Whatever fails or takes longer than the time-out ends the talking for good.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gradwatch.backends.torch_restart import restarts

Numbers = npt.NDArray[np.float64]
#: Seconds that the others have to say that they are there, once something failed; besides, until they next look.
ROLL_CALL = 2.0
#: Looks of all ranks together, a second, whether somebody calls the roll.
_LOOKS = 1000
#: How long a collective on a device may take: those of the training itself shall be the ones that time out.
_NEVER = timedelta(days=1)
#: Exchanges of this process so far, by topic.
_made: Counter[str] = Counter()


@dataclass
class Message:
    """One exchange under way.

    Args:
        build: Makes what is to be added up over the ranks, and what is to be compared for the largest (may be empty);
            called on the thread of the exchange.
        told: How many of the sums all ranks learn; rank 0 has all of them and the largest.
        text: Of rank 0, to be told to all; others leave it empty.
    """

    build: Callable[[], tuple[Numbers, Numbers]]
    told: int
    text: bytes = b""
    sums: Numbers = field(default_factory=lambda: np.zeros(0))
    largest: Numbers = field(default_factory=lambda: np.zeros(0))
    done: threading.Event = field(default_factory=threading.Event)
    is_well: bool = False


class Exchange:
    """Meets with the other ranks.

    Args:
        rank: This rank.
        world_size: Number of ranks.
        description: What this rank tells the others once; JSON types.
        timeout: Seconds that one exchange may take.
        topic: What it is about, the same on all ranks.

    Attributes:
        descriptions: Those of all ranks, in order; None until all were met.
        failure: Why there is no exchange any more; empty while there is.
        lost: Ranks that did not answer after a failure; known to rank 0.
        collectives: Number of collectives so far.
    """

    def __init__(
        self, rank: int, world_size: int, description: Mapping[str, Any], *, timeout: float, topic: str
    ) -> None:
        # The ranks must agree on a name without talking, also when an earlier run was watched on some of them only.
        _made[topic] += 1
        # The store of torchrun still has the addresses of the start before.
        self._name = f"gradwatch/{topic}/{restarts()}.{_made[topic]}"
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self.descriptions: list[Any] | None = None
        self.failure, self.lost = "", list[int]()
        self.collectives = 0
        self._patrol = max(1.0, world_size / _LOOKS)
        self._met = threading.Event()
        self._queue: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._pending: Message | None = None
        self._store = torch.distributed.distributed_c10d._get_default_store()
        self._in_step: dict[str, Any] = {}
        # A store serves one call at a time: a wait of ours must not hold up one of the user's.
        with contextlib.suppress(Exception):
            self._store = self._store.clone()  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._run, args=(description,), name="gradwatch-exchange", daemon=True)
        self._thread.start()

    def met(self, timeout: float | None = None) -> bool:
        """Wait until the descriptions of all ranks are there; whether they are."""
        self._met.wait(self.timeout if timeout is None else timeout)
        return self.descriptions is not None

    def send(self, message: Message) -> Message:
        """Begin an exchange: every rank sends its own in the same order, with arrays of the same lengths."""
        if self.failure:
            message.done.set()
        else:
            self._queue.put(message)
        return message

    def arrived(self, message: Message, timeout: float | None = None) -> bool:
        """Wait for an exchange; whether it succeeded. One that takes too long ends the talking."""
        limit = self.timeout if timeout is None else timeout
        # Behind the limit the thread gives up by itself, and looks who is there.
        if not message.done.wait(limit) and not (limit and message.done.wait(self._patrol + ROLL_CALL + 1.0)):
            self._fail(f"no answer within {limit:g} s")
        return message.is_well

    def add_up(self, numbers: torch.Tensor) -> None:
        """Add up numbers over the ranks now, in place; every rank calls this at the same place of its step.

        On CUDA devices the host does not wait for it, nor for a rank that is lost: the collectives of the training,
        which stand in the same queue, find that out.

        Raises:
            RuntimeError: A rank does not answer.
        """
        if self.failure:
            raise RuntimeError(self.failure)
        try:
            kind = numbers.device.type
            if kind not in self._in_step:
                self._in_step[kind] = self._nccl() if _has_nccl(kind) else self._group("in-step")
            self._reduce(self._in_step[kind], numbers)
        except Exception as error:
            self._fail(str(error).partition("\n")[0])
            self._in_step.clear()  # ranks that wait for this one do so no longer
            with contextlib.suppress(Exception):
                self._store.set(f"{self._name}/roll", "yes")
            self._thread.join(2 * self._patrol + ROLL_CALL)
            raise

    def close(self) -> None:
        """End the thread when it has sent what waits."""
        self._queue.put(None)
        self._thread.join(self.timeout if not self.failure else ROLL_CALL)

    def _run(self, description: Mapping[str, Any]) -> None:
        why = self._talk(description)
        if why:  # the group has gone by now, so that ranks that wait for this one in it do so no longer
            self._call_roll()
            self._fail(why)
        self._met.set()
        while self._pending is not None:
            self._pending.done.set()
            self._pending = None if self._queue.empty() else self._queue.get()

    def _talk(self, description: Mapping[str, Any]) -> str:
        """Exchange messages until there are no more; gives why that ended early."""
        try:
            group = self._group("flush")
            self.descriptions = [json.loads(text) for text in self._gather(group, json.dumps(description).encode())]
            self._met.set()
            while (message := self._next()) is not None:
                self._pending = message
                self._meet(group, message)
                message.is_well = not self.failure
                message.done.set()
        except Exception as error:  # noqa: BLE001 -- of whatever kind: the training goes on without the others
            return str(error).partition("\n")[0] or "unknown"
        return ""

    def _next(self) -> Message | None:
        """Wait for a message, and meanwhile for a roll call: a rank that waits for others elsewhere answers too."""
        while True:
            try:
                return self._queue.get(timeout=self._patrol)
            except queue.Empty:
                if self._is_called():
                    raise RuntimeError("another rank has ended the exchange") from None

    def _is_called(self) -> bool:
        with contextlib.suppress(Exception):  # the store may be gone with the rank that kept it
            return bool(self._store.check([f"{self._name}/roll"]))
        return False

    def _group(self, kind: str) -> Any:
        store = torch.distributed.distributed_c10d.PrefixStore(f"{self._name}/{kind}", self._store)
        limit = timedelta(seconds=self.timeout)
        return torch.distributed.ProcessGroupGloo(store, self.rank, self.world_size, limit)

    def _nccl(self) -> Any:
        store = torch.distributed.distributed_c10d.PrefixStore(f"{self._name}/nccl", self._store)
        options = torch.distributed.ProcessGroupNCCL.Options()
        options._timeout = _NEVER
        return torch.distributed.ProcessGroupNCCL(store, self.rank, self.world_size, options)

    def _reduce(self, group: Any, tensor: torch.Tensor) -> None:
        self.collectives += 1
        options = torch.distributed.AllreduceOptions()
        if tensor.is_cuda:
            group.allreduce([tensor], options).wait()
            return
        options.timeout = timedelta(seconds=self.timeout)
        line = tensor.cpu()
        group.allreduce([line], options).wait()
        if line is not tensor:
            tensor.copy_(line)

    def _meet(self, group: Any, message: Message) -> None:
        """Up a binomial tree to rank 0, adding up on the way, and down again with what all must know."""
        self.collectives += 1
        message.sums, message.largest = message.build()
        count, limit = len(message.sums), timedelta(seconds=self.timeout)
        line = torch.from_numpy(np.concatenate([message.sums, message.largest]))
        above, below = _neighbours(self.rank, self.world_size)
        other = torch.empty_like(line)
        for rank in below:
            group.recv([other], rank, 0).wait(limit)
            line[:count] += other[:count]
            torch.maximum(line[count:], other[count:], out=line[count:])
        answer = torch.cat([line[: message.told], torch.tensor([len(message.text)], dtype=torch.float64)])
        if above is not None:
            group.send([line], above, 0).wait(limit)
            group.recv([answer], above, 1).wait(limit)
        for rank in reversed(below):
            group.send([answer], rank, 1).wait(limit)
        message.text = self._tell(group, message.text, int(answer[-1]), above, below)
        message.sums = (line[:count] if above is None else answer[:-1]).numpy()
        message.largest = line[count:].numpy()

    def _tell(self, group: Any, text: bytes, length: int, above: int | None, below: Sequence[int]) -> bytes:
        """Pass a text of rank 0 down the tree, where there is one."""
        if not length:
            return b""
        line = torch.zeros(length, dtype=torch.uint8)
        limit = timedelta(seconds=self.timeout)
        if above is None:
            line = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        else:
            group.recv([line], above, 2).wait(limit)
        for rank in reversed(below):
            group.send([line], rank, 2).wait(limit)
        return line.numpy().tobytes()

    def _gather(self, group: Any, text: bytes) -> list[bytes]:
        length = torch.zeros(self.world_size, dtype=torch.int64)
        length[self.rank] = len(text)
        self._reduce(group, length)
        mine = torch.zeros(int(length.max()), dtype=torch.uint8)
        mine[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        every = [torch.zeros_like(mine) for _ in range(self.world_size)]
        self.collectives += 1
        group.allgather([every], [mine]).wait()
        return [each.numpy().tobytes()[:size] for each, size in zip(every, length.tolist(), strict=True)]

    def _fail(self, why: str) -> None:
        self.failure = self.failure or why or "unknown"

    def _call_roll(self) -> None:
        """Say that this rank is there, and ask the others; rank 0 looks who answers."""
        keys: Sequence[str] = [f"{self._name}/here/{rank}" for rank in range(self.world_size)]
        with contextlib.suppress(Exception):  # the store may be gone with the rank that was lost
            self._store.set(keys[self.rank], "yes")
            self._store.set(f"{self._name}/roll", "yes")
            until = time.monotonic() + self._patrol + ROLL_CALL
            while self.rank == 0 and time.monotonic() < until:
                self.lost = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
                if not self.lost:
                    return
                time.sleep(0.1)


def _neighbours(rank: int, count: int) -> tuple[int | None, list[int]]:
    """The parent of a rank in a binomial tree rooted at 0, and its children, the nearest first."""
    below, step = [], 1
    while step < count and not rank & step:
        if rank + step < count:
            below.append(rank + step)
        step *= 2
    return (rank - step if rank else None), below


def _has_nccl(device: str) -> bool:
    return device == "cuda" and torch.distributed.is_nccl_available()
