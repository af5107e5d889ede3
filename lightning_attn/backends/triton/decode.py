"""New tokens against a stored state, which is read once and written once for all of them:

    S <- lambda S + k_t v_t^T        o_t = scale * S^T q_t        for each token t in turn, lambda = e^{-s}

The state's traffic is the time: 128 KiB a head and call at K = V = 128 in float32. A program keeps BLOCK_V columns of one
head's state in registers, all of K, so that its outputs are its own and no program waits for another.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import config
from .config import Arch
from .launch import Launch, operand
from .primitives import advance, decay_parts, program_index, state_tile, tile_head_unit


# T = 1 is compiled without the loop; whether T is a multiple of 16 is no matter.
@triton.jit(do_not_specialize=["programs", "states"], do_not_specialize_on_alignment=["tokens"])
def decode_kernel(
    q, k, v, o,  # operands [B, T, H, K], [B, T, H, K], [B, T, H, V], [B, T, H, V]
    decay,  # [H] float32
    state,  # [S, H, K, V] float32 or bfloat16 as (pointer, row stride, head stride), updated
    slots,  # [B] int32 or int64, the row of the state that each row of the batch has, or None: its own number
    scale, programs, tokens, heads, states,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    index = program_index()
    if index >= programs:
        return
    tile, head, batch = tile_head_unit(index, tl.cdiv(V, BLOCK_V), heads)
    i, j = tl.arange(0, BLOCK_K), tile * BLOCK_V + tl.arange(0, BLOCK_V)
    row = (batch if slots is None else tl.load(slots + batch)).to(tl.int64)
    live = (row >= 0) & (row < states)  # any other row is padding: its output is zero
    in_state = (i < K)[:, None] & (j < V)[None, :] & live
    at = state_tile((state[0], state[1], state[2], V, 1), row, head, i, j)
    S = tl.load(at, mask=in_state, other=0.0).to(tl.float32)
    kept, loss = decay_parts(tl.load(decay + head))
    qp, kp = _token(q, batch, head) + i, _token(k, batch, head) + i
    vp, op = _token(v, batch, head) + j, _token(o, batch, head) + j
    for _ in range(tokens):
        qt = tl.load(qp, mask=i < K, other=0.0).to(tl.float32) * scale
        kt = tl.load(kp, mask=i < K, other=0.0).to(tl.float32)
        vt = tl.load(vp, mask=j < V, other=0.0).to(tl.float32)
        S = S * kept + (S * loss + kt[:, None] * vt[None, :])
        ot = tl.sum(S * qt[:, None], 0)
        tl.store(op, tl.where(live, ot, 0.0).to(op.dtype.element_ty), mask=j < V)
        qp += advance(q, 1)
        kp += advance(k, 1)
        vp += advance(v, 1)
        op += advance(o, 1)
    tl.store(at, S.to(at.dtype.element_ty), mask=in_state)


@triton.jit
def _token(x, batch, head):
    """Pointer to the first token of an operand."""
    return x[0] + batch.to(tl.int64) * x[1] + head.to(tl.int64) * x[3]


def launches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    decay: Tensor,
    state: Tensor,
    slots: Tensor | None,
    scale: float,
    arch: Arch,
) -> list[Launch]:
    B, T, H, K = q.shape
    V = v.shape[3]
    tiles = config.decode(K, V, state.element_size(), arch)
    programs = B * H * -(-V // tiles.value) if T else 0
    return [
        Launch(
            decode_kernel,
            programs,
            {
                "q": operand(q),
                "k": operand(k),
                "v": operand(v),
                "o": operand(o),
                "decay": decay,
                "state": (state, *state.stride()[:2]),
                "slots": slots,
                "scale": float(scale),
                "programs": programs,
                "tokens": T,
                "heads": H,
                "states": state.shape[0],
            },
            {"K": K, "V": V, "BLOCK_K": tiles.key, "BLOCK_V": tiles.value},
            tiles,
            bytes=B * H * (2 * K * V * state.element_size() + T * 2 * (K + V) * q.element_size()),
            again=B * H * T * 2 * K * q.element_size() * (-(-V // tiles.value) - 1),
            flops=B * T * H * 6 * K * V,
        )
    ]
