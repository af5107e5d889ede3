"""The mixture of experts: routing, the product of groups, the experts' MLP, and what trains and shrinks them."""

import torch
from torch import Tensor

from . import ops, validation
from .autocast import autocast
from .dispatch import accumulation_dtype

Quantized = tuple[Tensor, Tensor]


def moe_route(
    logits: Tensor, top_k: int, *, renormalize: bool = True, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The experts of each token and their weights (arXiv 2501.08313, section 2: top-k of a softmax).

        p = softmax(logits)        w_j = p_{e_j}, divided by the sum of all k with renormalize

    Differentiable once in the logits.

    Args:
        logits: [T, E] float32, bfloat16, float16 or float64. Each row's largest is finite; -inf leaves an expert out.
        top_k: how many experts a token has, from 1 to E.
        renormalize: whether the weights of a token sum to 1.
        backend: as for `lightning_attention`; "cuda" has this one too.

    Returns:
        weights [T, k] float32 (float64 for float64 logits), largest first; experts [T, k] int32. Of equal logits the one with
        the lowest expert comes first.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape or value. Values are read as for
            `lightning_attention`; where they are not, a NaN still gives experts from 0 to E - 1.
    """
    validation.types("moe_route", backend, logits=logits)
    validation.moe_route(logits, top_k, renormalize)
    if torch.is_grad_enabled() and logits.requires_grad:
        return ops.MoeRouteFunction.apply(logits, top_k, renormalize, backend)
    return ops.moe_route_forward(logits, top_k, renormalize, backend)


def grouped_gemm(x: Tensor, w: Tensor, offs: Tensor, *, backend: str = "auto") -> Tensor:
    """Each group of rows times the matrix of its group: y = x w_e^T for the rows from offs[e - 1] (0 for e = 0) to offs[e].

    Differentiable once in x and w. The gradient of the matrix of an empty group is zero.

    Args:
        x: [M, K] float32, bfloat16, float16 or float64, rows sorted by group. Any strides.
        w: [E, N, K] of x's dtype. Any strides; a copy is made only if neither of its last dimensions is contiguous.
        offs: [E] int32, where the rows of each group end: not decreasing, at most M. It is read on x's device only.
        backend: as for `lightning_attention`.

    Returns:
        y [M, N] in x's dtype, summed in float32 (float64 for float64). Rows past offs[-1] are zero. On "cpu" many rows are
        a matter of `torch.mm`, which in float32 obeys `torch.set_float32_matmul_precision`.

    Under autocast x and w are cast to its dtype (float64 is left alone).

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, device or value; a backend that cannot run.
            The values of offs are read as those of `lightning_attention`'s cu_seqlens are.
    """
    validation.types("grouped_gemm", backend, x=x, w=w, offs=offs)
    x, w = autocast(x, w)
    validation.grouped_gemm(x, w, offs)
    if torch.is_grad_enabled() and (x.requires_grad or w.requires_grad):
        return ops.GroupedGemmFunction.apply(x, w, offs, backend)
    return ops.grouped_gemm_forward(x, w, offs, backend)


def moe_mlp(
    x: Tensor,
    gate_up: Tensor | Quantized,
    down: Tensor | Quantized,
    weights: Tensor,
    experts: Tensor,
    *,
    layout: str = "concatenated",
    backend: str = "auto",
) -> Tensor:
    """The experts of a mixture, each a gated MLP (SwiGLU, arXiv 2002.05202):

        y_t = sum_j w_tj down_e (silu(gate_e x_t) * up_e x_t),  e = experts_tj

    Differentiable once in x, gate_up, down and weights; beside its inputs the backward keeps the pre-activations
    [T * k, 2F] and integers. Two runs give the same bits: nothing is summed by atomics.

    Args:
        x: [T, D] float32, bfloat16, float16 or float64.
        gate_up: [E, 2F, D] of x's dtype: of each expert the rows of the gate, then those of the up projection. Or a pair
            of int8 matrices [E, 2F, D] and float32 scales [E, 2F], as `quantize_experts` makes them: then nothing is
            differentiable.
        down: [E, D, F] of x's dtype, or a pair with scales [E, D].
        weights: [T, k] float32 (float64 for float64 x) or of x's dtype.
        experts: [T, k] int32 or int64, from 0 to E - 1.
        layout: "concatenated", or "interleaved" if rows 2f and 2f + 1 of gate_up are row f of the gate and of the up
            projection.
        backend: as for `lightning_attention`.

    Returns:
        y [T, D] in x's dtype. Sums are kept in float32 (float64 for float64); activations are rounded to x's dtype, as are
        pre-activations for the backward and in the products of "cpu": in float16 they must stay below 65504. Many rows of
        an expert on "cpu": as for `grouped_gemm`.

    Under autocast x, gate_up and down are cast to its dtype (float64 and int8 are left alone).

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, device or value; a backend that cannot run.
            The values of experts are read as those of `lightning_attention`'s cu_seqlens are; where they are not, an
            expert out of range adds nothing.
    """
    validation.types("moe_mlp", backend, x=x, weights=weights, experts=experts)
    given = x.dtype
    (x,) = autocast(x)
    if x.dtype != given and weights.dtype == given:  # which is allowed, as is float32
        weights = weights.to(torch.float32)
    if isinstance(gate_up, Tensor) and isinstance(down, Tensor):
        gate_up, down = autocast(gate_up, down)
    validation.moe_mlp(x, gate_up, down, weights, experts, layout)
    interleaved = layout == "interleaved"
    if isinstance(gate_up, tuple) and isinstance(down, tuple):
        return ops.moe_mlp_forward(x, *gate_up, *down, weights, experts, interleaved, False, backend)[0]
    assert isinstance(gate_up, Tensor) and isinstance(down, Tensor), "validated"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, gate_up, down, weights)):
        return ops.MoeMlpFunction.apply(x, gate_up, down, weights, experts, interleaved, backend)
    return ops.moe_mlp_forward(x, gate_up, None, down, None, weights, experts, interleaved, False, backend)[0]


def quantize_experts(gate_up: Tensor, down: Tensor) -> tuple[Quantized, Quantized]:
    """Both matrices of the experts in int8, symmetric, with a scale for each output channel, for `moe_mlp`:

        scale_n = max_k |w_nk| / 127        q_nk = round(w_nk / scale_n)

    so that |w - scale q| <= scale / 2.

    Args:
        gate_up: [E, 2F, D], in either layout.
        down: [E, D, F].

    Returns:
        ((int8 [E, 2F, D], float32 [E, 2F]), (int8 [E, D, F], float32 [E, D])), on the device of the matrices.

    Raises:
        TypeError, ValueError: a wrong type, dtype or shape; on a CPU also a matrix that is not finite.
    """
    validation.quantize_experts(gate_up, down)
    return _quantize("gate_up", gate_up), _quantize("down", down)


@torch.no_grad()
def _quantize(name: str, w: Tensor) -> Quantized:
    q = torch.empty_like(w, dtype=torch.int8, memory_format=torch.contiguous_format)
    scales = w.new_empty(w.shape[:2], dtype=torch.float32)
    for e, matrix in enumerate(w):  # one at a time: all of them in float32 may not fit
        wide = matrix.to(accumulation_dtype(w.dtype))
        largest = wide.abs().amax(1) if w.shape[2] else wide.new_zeros(w.shape[1])
        scale = (largest / 127).to(torch.float32)
        if ops.check_values(w) and not torch.compiler.is_compiling():
            validation.finite_expert("quantize_experts", name, e, scale)
        # A row of zeros has a scale of one, as has one so small that the scale would be subnormal.
        scales[e] = torch.where(scale >= torch.finfo(torch.float32).tiny, scale, 1)
        q[e] = torch.round(wide / scales[e, :, None]).clamp_(-127, 127).to(torch.int8)
    return q, scales


def load_balancing_loss(logits: Tensor, experts: Tensor) -> Tensor:
    """The auxiliary loss of arXiv 2501.08313 (section 2), before its coefficient:

        L = 1/E sum_e f_e m_e

    f_e is the fraction of the tokens that have expert e among their k, m_e the mean of its probability over the tokens.
    It is least, k / E^2, where all experts are chosen alike. transformers' loss is E^2 times as large.

    Args:
        logits: [T, E], of the router.
        experts: [T, k] int32 or int64, as `moe_route` gives them.

    Returns:
        A float32 scalar (float64 for float64 logits), differentiable in the logits; zero for T = 0.
    """
    validation.load_balancing_loss(logits, experts)
    T, E = logits.shape
    dtype = accumulation_dtype(logits.dtype)
    one = torch.ones_like(experts, dtype=torch.int64).flatten()  # float32 cannot count beyond 2^24
    counts = one.new_zeros(E).index_add(0, experts.flatten().long(), one).to(dtype)
    m = logits.softmax(-1, dtype=dtype).sum(0)
    return (counts * m).sum() / (E * max(T, 1) ** 2)


def router_z_loss(logits: Tensor) -> Tensor:
    """The mean over the tokens of logsumexp(logits)^2, which keeps the logits small (arXiv 2202.08906, equation 5).

    Args:
        logits: [T, E], of the router.

    Returns:
        A float32 scalar (float64 for float64 logits), differentiable in the logits; zero for T = 0.
    """
    validation.router_logits("router_z_loss", logits)
    z = logits.to(accumulation_dtype(logits.dtype)).logsumexp(-1)
    return z.square().sum() / max(len(z), 1)
