"""A small text model with all that is parallel in it, on ranks: worlds, twins and gradients."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import ranks_support
import torch
from models_support import randomize, tokens
from ranks_support import Ranks
from torch import Tensor

from models.config import LIGHTNING, SOFTMAX, TextConfig
from models.parallel import Sizes, World
from models.text import CausalLM
from models.training import Alone, Side

RANKS = 4
CONFIG = TextConfig(
    vocab_size=97,
    hidden_size=24,
    intermediate_size=8,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rotary_dim=4,
    num_local_experts=4,
    num_experts_per_tok=2,
    attn_type_list=(LIGHTNING, SOFTMAX, LIGHTNING),
    rope_theta=1e4,
)
# All ways to share out four ranks.
SHARES = ((1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4))  # ep, etp
SIZES = [Sizes(cp, ep, etp) for cp in (1, 2, 4) for ep, etp in SHARES]


@contextmanager
def fresh_ranks(timeout: float) -> Iterator[Ranks]:
    """Four, born with the models imported, where no test before these had ranks of its own: that takes longer than what they do."""
    forkserver.set_forkserver_preload(["ranks_support", "models_ranks_support"])
    forkserver.ensure_running()
    with ranks_support.fresh_ranks(RANKS, timeout) as ranks:
        yield ranks


@functools.cache
def world_of(sizes: Sizes) -> World:
    """Made once in each rank, by all of them."""
    return World(sizes)


def dense_model(dtype: torch.dtype = torch.float64, config: TextConfig = CONFIG) -> CausalLM:
    """The same on every rank, with weights large enough that every part matters."""
    model = CausalLM(config, dtype=dtype)
    randomize(model)
    return model


def prompts_of(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    return [tokens(n, seed=seed + i).tolist() for i, n in enumerate(lengths)]


def offsets(lengths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(accumulate(lengths, initial=0))


def gradients(side: Side, batch: Tensor, balance: float, factor: float) -> dict[str, Any]:
    """Of one step with factor times the loss: what is minimised, the cross-entropy and the clipped gradients of the dense model, by
    name. Its parameters are replaced by them.
    """
    for p in side.model.parameters():
        p.grad = None
    total, entropy = side.loss(batch, balance)
    (factor * total).backward()
    side.finish()
    with torch.no_grad():
        for p in side.model.parameters():
            assert p.grad is not None
            p.copy_(p.grad)
    return {"total": total.detach(), "entropy": entropy.detach(), "gradients": side.whole().state_dict()}


@functools.cache
def alone(rows: int, length: int, balance: float, factor: float) -> dict[str, Any]:
    """The same in one process, and the norm of the gradient before it was clipped."""
    side = Alone(dense_model())
    batch = tokens(rows, length + 1)
    total, _ = side.loss(batch, balance)
    grads = torch.autograd.grad(factor * total, list(side.model.parameters()))
    norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt().item()
    return {"norm": norm, **gradients(side, batch, balance, factor)}


# ---- the command -----------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent


def own_text(directory: Path) -> Path:
    """A file of bytes with something to learn in it, short enough to be read at once."""
    file = directory / "text"
    file.write_bytes(b"".join(b"%d and %d is %d\n" % (a, b, a + b) for a in range(40) for b in range(30)))
    return file


def torchrun(ranks: int, *args: object, restarts: int = 0, log: Path) -> subprocess.Popen[bytes]:
    """`torchrun ... -m models.train_tiny`, with what it says in a file."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [f"--max-restarts={restarts}", "-m", "models.train_tiny", *map(str, args)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with log.open("wb") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)


def finished(process: subprocess.Popen[bytes], log: Path, timeout: float = 300) -> str:
    """What it has said, when it has ended well."""
    try:
        code = process.wait(timeout)
    finally:
        process.terminate()  # and its workers with it
    said = log.read_text(errors="replace")
    assert code == 0, said
    return said
