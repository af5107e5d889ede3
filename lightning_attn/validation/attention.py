"""The errors of attention, decode and the layer."""

import math

import torch
from torch import Tensor

from .common import dims, floating, index, number, same_device, tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """The structure of the arguments of lightning_attention."""
    function = "lightning_attention"
    _tokens(function, q, k, v, decay, scale)
    N, _, H, K = q.shape
    if cu_seqlens is not None:
        _cu_seqlens(function, cu_seqlens, q)
        if N != 1:
            raise ValueError(f"{function}: expected q of shape [1, T, H, K] with cu_seqlens, got {dims(q)}")
        N = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        _initial_state(function, "initial_state", initial_state, (N, H, K, v.shape[3]), q.dtype)
        same_device(function, "initial_state", initial_state, "q", q)


def _cu_seqlens(function: str, cu_seqlens: Tensor, like: Tensor) -> None:
    index(function, "cu_seqlens", cu_seqlens, like)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{function}: expected cu_seqlens of shape [N + 1], got {dims(cu_seqlens)}")


def _initial_state(
    function: str, name: str, state: Tensor, shape: tuple[int, ...], inputs_dtype: torch.dtype
) -> None:
    tensor(function, name, state)
    dtype = torch.float64 if inputs_dtype == torch.float64 else torch.float32
    if state.dtype != dtype:
        raise TypeError(f"{function}: expected {name} of dtype {dtype}, got {state.dtype}")
    if state.shape != shape:
        raise ValueError(
            f"{function}: expected {name} of shape [N, H, K, V] = {list(shape)}, got {dims(state)}"
        )


def decode(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, slots: Tensor | None, scale: float
) -> None:
    """The structure of the arguments of lightning_attention_decode."""
    function = "lightning_attention_decode"
    _tokens(function, q, k, v, decay, scale)
    B, _, H, K = q.shape
    V = v.shape[3]
    tensor(function, "state", state)
    dtypes = (torch.float64,) if q.dtype == torch.float64 else (torch.float32, torch.bfloat16)
    if state.dtype not in dtypes:
        names = " or ".join(map(str, dtypes))
        raise TypeError(f"{function}: expected state of dtype {names}, got {state.dtype}")
    if state.dim() != 4 or state.shape[1:] != (H, K, V) or (slots is None and state.shape[0] != B):
        S = "S" if slots is not None else f"B = {B}"
        raise ValueError(
            f"{function}: expected state of shape [S, H, K, V] = [{S}, {H}, {K}, {V}], got {dims(state)}"
        )
    if not state.is_contiguous() and not _disjoint_matrices(state):
        raise ValueError(
            f"{function}: expected state of dense [K, V] matrices that do not overlap, "
            f"got strides {list(state.stride())}"
        )
    same_device(function, "state", state, "q", q)
    if slots is not None:
        index(function, "slots", slots, q)
        if slots.shape != (B,):
            raise ValueError(f"{function}: expected slots of shape [B] = [{B}], got {dims(slots)}")
    if torch.is_grad_enabled():
        for name, x in (("q", q), ("k", k), ("v", v), ("state", state)):
            if x.requires_grad:
                raise ValueError(
                    f"{function}: expected {name} without requires_grad (decoding is not differentiable: "
                    "use torch.no_grad() or lightning_attention), got a tensor that requires grad"
                )


def layer(
    x: Tensor,
    hidden_size: int,
    state_shape: tuple[int, int, int],
    state: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> None:
    """The structure of the arguments of LightningAttention that lightning_attention does not see."""
    function = "LightningAttention"
    tensor(function, "x", x)
    if x.dim() != 3 or x.shape[2] != hidden_size:
        raise ValueError(f"{function}: expected x of shape [B, T, {hidden_size}], got {dims(x)}")
    if attention_mask is not None:
        if cu_seqlens is not None:
            raise ValueError(f"{function}: expected attention_mask or cu_seqlens, got both")
        tensor(function, "attention_mask", attention_mask)
        if attention_mask.shape != x.shape[:2]:
            raise ValueError(
                f"{function}: expected attention_mask of shape [B, T] = {dims(x)[:2]}, "
                f"got {dims(attention_mask)}"
            )
        same_device(function, "attention_mask", attention_mask, "x", x)
    if cu_seqlens is not None:
        _cu_seqlens(function, cu_seqlens, x)
    if state is not None:
        N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        _initial_state(function, "state", state, (N, *state_shape), x.dtype)
        same_device(function, "state", state, "x", x)


def attention_values(function: str, decay: Tensor, cu_seqlens: Tensor | None, T: int) -> None:
    """The values of decay, and of cu_seqlens for T packed tokens."""
    _decay_values(function, decay)
    if cu_seqlens is None:
        return
    first, last = cu_seqlens[0].item(), cu_seqlens[-1].item()
    if first != 0:
        raise ValueError(f"{function}: expected cu_seqlens to start at 0, got {first}")
    if last != T:
        raise ValueError(f"{function}: expected cu_seqlens to end at T = {T}, got {last}")
    decreases = cu_seqlens[1:] < cu_seqlens[:-1]
    if decreases.any():
        i = int(decreases.nonzero()[0])
        pair = f"{cu_seqlens[i].item()} then {cu_seqlens[i + 1].item()} at index {i}"
        raise ValueError(f"{function}: expected cu_seqlens not to decrease, got {pair}")


def decode_values(function: str, decay: Tensor, slots: Tensor | None, S: int) -> None:
    """The values of decay, and of slots for S state rows."""
    _decay_values(function, decay)
    if slots is None:
        return
    used = [slot for slot in slots.tolist() if slot != -1]
    if used and not 0 <= min(used) <= max(used) < S:
        wrong = min(used) if min(used) < 0 else max(used)
        raise ValueError(f"{function}: expected slots in [0, {S}) or -1, got {wrong}")
    if len(set(used)) != len(used):
        twice = next(slot for slot in used if used.count(slot) > 1)
        raise ValueError(f"{function}: expected slots without duplicates, got {twice} more than once")


def _decay_values(function: str, decay: Tensor) -> None:
    if decay.numel() == 0:
        return
    low, high = (x.item() for x in torch.aminmax(decay))
    if not 0 <= low <= high < math.inf:  # false for NaN
        raise ValueError(f"{function}: expected decay finite and >= 0, got values from {low:g} to {high:g}")


def _tokens(function: str, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, scale: float) -> None:
    floating(function, "q", q)
    dtype = q.dtype
    if k.dtype != dtype:
        raise TypeError(f"{function}: expected k of q's dtype {dtype}, got {k.dtype}")
    if v.dtype != dtype:
        raise TypeError(f"{function}: expected v of q's dtype {dtype}, got {v.dtype}")
    if decay.dtype != torch.float32:
        raise TypeError(f"{function}: expected decay of dtype float32, got {decay.dtype}")
    if q.dim() != 4:
        raise ValueError(f"{function}: expected q of shape [B, T, H, K], got {dims(q)}")
    shape = q.shape
    if k.shape != shape:
        raise ValueError(f"{function}: expected k of q's shape [B, T, H, K] = {dims(q)}, got {dims(k)}")
    B, T, H, _ = shape
    if v.dim() != 4 or v.shape[:3] != shape[:3]:
        raise ValueError(f"{function}: expected v of shape [B, T, H, V] = [{B}, {T}, {H}, V], got {dims(v)}")
    if decay.shape != (H,):
        raise ValueError(f"{function}: expected decay of shape [H] = [{H}], got {dims(decay)}")
    same_device(function, "k", k, "q", q)
    same_device(function, "v", v, "q", q)
    same_device(function, "decay", decay, "q", q)
    number(function, "scale", scale)
    if decay.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{function}: expected decay to be a constant, got a tensor that requires grad")


def _disjoint_matrices(state: Tensor) -> bool:
    """Whether a state [S, H, K, V] is made of dense [K, V] matrices that share no memory."""
    if state.numel() == 0:
        return True
    S, H, K, V = state.shape
    stride_s, stride_h, stride_k, stride_v = state.stride()
    if (V > 1 and stride_v != 1) or (K > 1 and stride_k != V):
        return False
    extent = K * V
    for stride, size in sorted(((stride_s, S), (stride_h, H))):
        if size > 1:
            if stride < extent:
                return False
            extent += stride * (size - 1)
    return True
