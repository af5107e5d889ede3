"""The bytes that a rank receives, counted where PyTorch dispatches its exchanges."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


class Received(TorchDispatchMode):
    """Counts what this rank receives from the others of a group through torch.distributed while it is entered, by operator. One
    that it does not know is an error.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.bytes: dict[str, int] = {}

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = function._schema.name.partition("::")
        if namespace == "c10d":
            self.bytes[name] = self.bytes.get(name, 0) + self._bytes(name, args)
        return function(*args, **(kwargs or {}))

    def _bytes(self, name: str, args: Any) -> int:
        if name in ("send", "barrier"):
            return 0
        if name == "recv_":
            return sum(x.nbytes for x in args[0])
        if name == "_allgather_base_":  # output, input, group
            return args[0].nbytes - args[1].nbytes
        if name == "alltoall_base_":  # output, input, group, output and input splits; what is its own stays
            output, splits = args[0], args[3]
            own = splits[self.rank] if splits else output.shape[0] // self.size
            return output.nbytes - own * (output.nbytes // max(output.shape[0], 1))
        raise AssertionError(f"bytes of {name} are not counted")
