"""What the algorithms across ranks say to each other: exchanges of tensors, and the agreement on what they are about to do.

Every public function begins with a `call`: the ranks tell each other, through the store of the process group, what they were
called with. A rank whose arguments differ, that raised, or that does not come becomes a `RankError` on all of them, before
any tensor is sent. On a CPU that is so at every call; on a GPU for arguments not seen before, for which the host waits for the other
ranks, and always with LIGHTNING_ATTN_CHECK=1. What is sent is tensors alone: nothing is added to them for this.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, distributed_c10d

# Its name from PyTorch 2.13 on, and the one before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_LONGEST = 160  # characters of a fact as it is told; longer ones are told by their hash
_REMEMBERED = 1024  # calls of a group that a GPU need not compare again
_VERDICT = "verdict"


class RankError(RuntimeError):
    """A rank did not do as the others: it was called with other arguments, raised, was killed or hung. No rank returns a result of
    the call. After a disagreement the group can be used again; after a failed exchange it cannot, as after any failed collective.
    Ranks are numbered as in the group.
    """


class Ranks:
    """A process group as one of its members sees it, during one call of a public function."""

    def __init__(self, function: str, group: ProcessGroup) -> None:
        self.function, self.group = function, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.number = 0  # of this agreement of the group

    # ---- agreement -------------------------------------------------------------------------------------------------
    #
    # Each rank posts what it was called with; rank 0 reads all of it and posts the verdict, which the others read: R messages
    # each way. All under keys of the store with the number of the agreement, which all ranks count alike.

    def agree(self, facts: Mapping[str, object], device: torch.device) -> None:
        """Returns when every rank has come with equal `facts`, else raises RankError on every rank."""
        if self.size == 1:
            return
        told = {name: _told(value) for name, value in facts.items()}
        with self._failing_store():
            group = _group(self.group)
        seen = (self.function, *told.items())
        if device.type != "cpu" and seen in group.agreed and os.environ.get("LIGHTNING_ATTN_CHECK") != "1":
            group.agreed.move_to_end(seen)
            return
        self._post(json.dumps({"function": self.function, "facts": told}))
        if self.rank == 0:
            self._judge()
        if verdict := self._wait([_VERDICT])[0]:
            raise RankError(f"{self.function}: expected {verdict}")
        with (
            self._failing_store()
        ):  # rank 0 has read what this one posted, and all have read the verdict before
            store = group.store
            for number in range(group.forgotten + 1, self.number + 1):
                store.delete_key(_key(number, self.rank))
                if self.rank == 0:
                    store.delete_key(_key(number - 1, _VERDICT))
        group.forgotten = self.number
        if device.type != "cpu":
            group.agreed[seen] = None
            if len(group.agreed) > _REMEMBERED:
                group.agreed.popitem(last=False)
            if (
                not group.joined
            ):  # NCCL wants all ranks in the first communication of a group, be it point to point
                self.all_gather(torch.zeros(1, device=device)).wait()
                group.joined = True

    def backward(self, facts: Mapping[str, object], device: torch.device) -> Ranks:
        """The agreement before the backward of this call, told from those of other calls."""
        with call(f"{self.function} backward", self.group) as ranks:
            forward = {"forward": self.number} if device.type == "cpu" else {}
            ranks.agree({**facts, **forward}, device)
        return ranks

    def raised(self, error: BaseException) -> None:
        """Tells the others, who may be waiting in `agree`, that this rank does not come."""
        if self.size > 1:
            words = f"{type(error).__name__}: {error}"
            try:
                self._post(json.dumps({"raised": words}))
                if self.rank == 0:
                    self._say(f"all {self.size} ranks to call it, got {words} on rank 0")
            except RuntimeError:  # the store is gone, and with it those who could be told
                pass

    def _post(self, said: str) -> None:
        with self._failing_store():
            group = _group(self.group)
            group.calls += 1
            self.number = group.calls
            group.store.set(_key(self.number, self.rank), said)

    def _say(self, verdict: str) -> None:
        with self._failing_store():
            _group(self.group).store.set(_key(self.number, _VERDICT), verdict)

    def _judge(self) -> None:
        """On rank 0: compares what all ranks have posted with its own."""
        try:
            posted = self._wait(list(range(self.size)))
        except RankError as error:
            self._say(str(error).removeprefix(f"{self.function}: expected "))
            raise
        first, *others = map(json.loads, posted)
        for rank, said in enumerate(others, 1):
            if "raised" in said:
                return self._say(f"all {self.size} ranks to call it, got {said['raised']} on rank {rank}")
            if said["function"] != first["function"]:
                calls = f"{first['function']} on rank 0 and of {said['function']} on rank {rank}"
                return self._say(f"all {self.size} ranks to make the same call, got a call of {calls}")
            for name in {**first["facts"], **said["facts"]}:
                mine, theirs = first["facts"].get(name), said["facts"].get(name)
                if mine != theirs:
                    values = f"{mine} on rank 0 and {theirs} on rank {rank}"
                    return self._say(f"the same {name} on all {self.size} ranks, got {values}")
        self._say("")

    def _wait(self, whose: Sequence[int | str]) -> list[str]:
        """What stands under these keys of this agreement, once all of it does."""
        limit = timeout(self.group)
        with self._failing_store():
            store = _group(self.group).store
            keys = [_key(self.number, who) for who in whose]
            deadline, pause = time.monotonic() + limit.total_seconds(), 1e-5
            while not store.check(keys):  # not store.wait, which would lock the store for other threads
                if time.monotonic() > deadline:
                    late = [r for r in range(self.size) if not store.check([_key(self.number, r)])]
                    raise RankError(
                        f"{self.function}: expected all {self.size} ranks to call it within {limit}, got no call on {_ranks(late)}"
                    )
                time.sleep(pause)
                pause = min(2 * pause, 2e-3)
            return [said.decode() for said in store.multi_get(keys)]

    @contextmanager
    def _failing_store(self) -> Iterator[None]:
        try:
            yield
        except RankError:
            raise
        except RuntimeError as error:
            raise RankError(
                f"{self.function}: expected the store of the process group to answer, got {_first_line(error)}"
            ) from error

    # ---- exchanges -------------------------------------------------------------------------------------------------

    def all_gather(self, x: Tensor) -> Pending:
        """x of every rank, of equal shapes -> [R, *x.shape]."""
        x = x.contiguous()
        out = x.new_empty(self.size, *x.shape)
        if self.size == 1:
            out[0] = x
            return Pending(self, "an all-gather", out, [])
        with self.failing("an all-gather"):
            work = _all_gather(out.view(-1), x.view(-1), group=self.group, async_op=True)
        return Pending(self, "an all-gather", out, [work], keep=x)

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Pending:
        """Rows of x [sum(send), ...], the first send[0] of them for rank 0 and so on -> those that came, by rank."""
        x = x.contiguous()
        out = x.new_empty(sum(receive), *x.shape[1:])
        if self.size == 1:
            out.copy_(x)
            return Pending(self, "an all-to-all", out, [])
        with self.failing("an all-to-all"):
            work = dist.all_to_all_single(out, x, list(receive), list(send), group=self.group, async_op=True)
        return Pending(self, "an all-to-all", out, [work], keep=x)

    def pass_on(self, send: Sequence[tuple[int, Tensor]], receive: Sequence[tuple[int, Tensor]]) -> Pending:
        """Point to point, all at once: (to, x) and (from, where x goes, contiguous) by rank of the group. Tensors without
        elements are not sent. What is to a rank must come in the order in which that rank waits for it.
        """
        members = dist.get_process_group_ranks(self.group)
        sent = [(to, x.contiguous()) for to, x in send if x.numel()]
        ops = [dist.P2POp(dist.isend, x, members[to], self.group) for to, x in sent]
        ops += [dist.P2POp(dist.irecv, x, members[of], self.group) for of, x in receive if x.numel()]
        with self.failing("a send"):
            works = dist.batch_isend_irecv(ops) if ops else []
        return Pending(self, "a send", torch.empty(0), works, keep=[x for _, x in sent])

    @contextmanager
    def failing(self, what: str) -> Iterator[None]:
        """What torch.distributed raises, as a RankError."""
        try:
            yield
        except RankError:
            raise
        except RuntimeError as error:
            raise RankError(
                f"{self.function}: expected {what} among all {self.size} ranks, got on rank {self.rank}: {_first_line(error)}"
            ) from error


class Pending:
    """An exchange under way. `wait` gives its result, for work that the caller's device does from then on."""

    def __init__(
        self, ranks: Ranks, what: str, out: Tensor, works: Sequence[Any], keep: object = None
    ) -> None:
        self._ranks, self._what, self._out, self._works = ranks, what, out, works
        self._keep = keep  # what is being sent must not be freed

    def wait(self) -> Tensor:
        with self._ranks.failing(self._what):
            for work in self._works:
                work.wait()
        self._works, self._keep = [], None
        return self._out


@contextmanager
def call(function: str, group: ProcessGroup | None) -> Iterator[Ranks]:
    """The beginning of a call of a public function, on the default group for None: validation and `agree` stand in it, so
    that the other ranks are told if this one raises there.
    """
    if not dist.is_initialized():
        raise ValueError(
            f"{function}: expected torch.distributed to be initialised (dist.init_process_group), got none"
        )
    if group is None:
        group = dist.group.WORLD
    if not isinstance(group, ProcessGroup):
        raise TypeError(f"{function}: expected group to be a ProcessGroup, got {type(group).__name__}")
    if dist.get_rank(group) < 0:
        raise ValueError(f"{function}: expected a group that this rank is in, got one without it")
    ranks = Ranks(function, group)
    try:
        yield ranks
    except RankError:
        raise
    except Exception as error:
        ranks.raised(error)
        raise


def timeout(group: ProcessGroup) -> timedelta:
    """After which a collective of the group fails."""
    for device in ("cuda", "cpu"):
        try:
            return group._get_backend(torch.device(device)).options._timeout
        except (RuntimeError, AttributeError):
            continue
    return distributed_c10d.default_pg_timeout


@dataclass
class _Group:
    """What a process remembers of a group."""

    store: Any
    calls: int = 0  # agreements that it has come to
    forgotten: int = 0  # up to which of them what it posted is deleted
    agreed: OrderedDict[tuple, None] = field(default_factory=OrderedDict)  # on a GPU, the latest
    joined: bool = False  # on a GPU: all ranks have communicated


_groups: WeakKeyDictionary[ProcessGroup, _Group] = WeakKeyDictionary()


def _group(group: ProcessGroup) -> _Group:
    if group not in _groups:
        # Names of groups come again after destroy_process_group, and a store may outlive the processes that torchrun restarts.
        life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(
            f"lightning_attn/{life}/{group.group_name}", distributed_c10d._get_default_store()
        )
        again = store.add(f"made/{dist.get_rank(group)}", 1)
        _groups[group] = _Group(dist.PrefixStore(str(again), store))
    return _groups[group]


def _key(number: int, who: int | str) -> str:
    return f"{number}/{who}"


def _told(value: object) -> str:
    text = str(value)
    if len(text) <= _LONGEST:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{text[: _LONGEST // 2]}... (sha256 {digest})"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) != 1)} {', '.join(map(str, ranks))}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
