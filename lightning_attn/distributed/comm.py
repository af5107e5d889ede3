"""What the algorithms across ranks say to each other: exchanges of tensors, and the agreement on what they are about to do.

Every public function begins with a `call`: the ranks tell each other, through the store of the process group, what they were
called with. A rank whose arguments differ, that raised, or that does not come becomes a `RankError` on all of them, before
any tensor is sent. On a CPU that is so at every call; on a GPU, where a call should cost nothing, for arguments not seen
before, and always with LIGHTNING_ATTN_CHECK=1. What is sent is tensors alone: nothing is added to them for this.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, distributed_c10d

# Its name from PyTorch 2.13 on, and the one before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_LONGEST = 160  # characters of a fact as it is told; longer ones are told by their hash


class RankError(RuntimeError):
    """A rank did not do as the others: it was called with other arguments, raised, was killed or hung. No rank returns a
    result of the call, and the process group is of no use any more, as after any failed collective.
    """


class Ranks:
    """A process group as one of its members sees it, during one call of a public function."""

    def __init__(self, function: str, group: ProcessGroup) -> None:
        self.function, self.group = function, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.call = 0  # which agreement of the group this is; a backward tells that of its forward, lest two be confused

    # ---- agreement -------------------------------------------------------------------------------------------------

    def agree(self, facts: Mapping[str, object], device: torch.device) -> None:
        """Returns when every rank has come with equal `facts`, else raises RankError on every rank."""
        told = {name: _told(value) for name, value in facts.items()}
        if self.size == 1:
            return
        seen = (self.group.group_name, self.function, tuple(told.items()))
        if device.type != "cpu" and seen in _agreed and os.environ.get("LIGHTNING_ATTN_CHECK") != "1":
            return
        self._post({"function": self.function, "facts": told})
        mine = {"function": self.function, "facts": told}
        for rank, said in enumerate(self._hear()):
            if "raised" in said:
                raise RankError(
                    f"{self.function}: expected all {self.size} ranks to call it, got {said['raised']} on rank {rank}"
                )
            if said["function"] != mine["function"]:
                raise RankError(
                    f"{self.function}: expected all {self.size} ranks to call it, got a call of {said['function']} on rank {rank}"
                )
            for name in {**told, **said["facts"]}:
                ours, theirs = told.get(name), said["facts"].get(name)
                if ours != theirs:
                    raise RankError(
                        f"{self.function}: expected the same {name} on all {self.size} ranks, got {ours} on rank {self.rank} "
                        f"and {theirs} on rank {rank}"
                    )
        if device.type != "cpu":
            _agreed.add(seen)

    def raised(self, error: BaseException) -> None:
        """Tells the others, who may be waiting in `agree`, that this rank does not come."""
        if self.size > 1:
            try:
                self._post({"raised": f"{type(error).__name__}: {error}"})
            except RuntimeError:  # the store is gone, and with it those who could be told
                pass

    def _post(self, said: Mapping[str, object]) -> None:
        name = self.group.group_name
        self.call = _calls[name] = _calls.get(name, 0) + 1
        with self._told_by_store("to be told of the call"):
            store = _store(self.group)
            store.set(_key(self.call, self.rank), json.dumps(said))
            if (
                self.call > 2
            ):  # everybody has come to the call before, so nobody reads the one before that any more
                store.delete_key(_key(self.call - 2, self.rank))

    def _hear(self) -> list[dict[str, Any]]:
        with self._told_by_store("to be told of the call"):
            store = _store(self.group)
            keys = [_key(self.call, rank) for rank in range(self.size)]
            deadline, pause = time.monotonic() + timeout(self.group).total_seconds(), 1e-5
            while not store.check(keys):  # not store.wait, which would lock the store for other threads
                if time.monotonic() > deadline:
                    late = [rank for rank, key in enumerate(keys) if not store.check([key])]
                    raise RankError(
                        f"{self.function}: expected all {self.size} ranks to call it within {timeout(self.group)}, "
                        f"got no call on {_ranks(late)}"
                    )
                time.sleep(pause)
                pause = min(2 * pause, 2e-3)
            heard = [json.loads(said) for said in store.multi_get(keys)]
            # Everybody has come to this call, so nobody reads what was told in those before.
            for call in range(_forgotten.get(self.group.group_name, 0) + 1, self.call):
                store.delete_key(_key(call, self.rank))
            _forgotten[self.group.group_name] = self.call - 1
            return heard

    @contextmanager
    def _told_by_store(self, purpose: str) -> Iterator[None]:
        try:
            yield
        except RankError:
            raise
        except RuntimeError as error:
            raise RankError(
                f"{self.function}: expected the store of the process group {purpose}, got {_first_line(error)}"
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
    if not dist.is_available() or not dist.is_initialized():
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


_calls: dict[str, int] = {}  # by group: how many agreements it has come to
_forgotten: dict[str, int] = {}  # by group: up to which of them this rank's words are deleted
_agreed: set[tuple] = set()


def _store(group: ProcessGroup) -> Any:
    return dist.PrefixStore(f"lightning_attn/{group.group_name}", distributed_c10d._get_default_store())


def _key(call: int, rank: int) -> str:
    return f"{call}/{rank}"


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
