"""The auxiliary loss of a router whose tokens are spread over ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..dispatch import accumulation_dtype
from ..ops import check_values
from ..validation import expert_parallel as validation
from ..validation import moe_mlp_values
from .comm import call


def load_balancing_share(logits: Tensor, experts: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """This rank's share of `load_balancing_loss` (arXiv 2501.08313, section 2) over the tokens of all ranks of `group`:

        L = 1/E sum_e f_e m_e        share_r = 1/E sum_e f_e m_re

    f_e is the fraction of all tokens that have expert e among their k, m_re the sum of its probability over this rank's
    tokens, divided by the number of all. The sum of the shares over the ranks is L, and the gradients of a rank's share are
    those of L in its logits, so the share is added to the rank's share of the training loss. What is sent are E + 1 int64.

    Args:
        logits: [T, E] of this rank's tokens; T differs from rank to rank and may be zero.
        experts: [T, k] int32 or int64, as `moe_route` gives them.
        group: the ranks that the tokens are spread over; None for the default group. All must call it.

    Returns:
        A float32 scalar (float64 for float64 logits), differentiable in the logits. No gradient goes through f.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, device or, on a CPU, value.
        RankError: the ranks disagree about E or k, or one of them does not come.
    """
    with call("load_balancing_share", group) as ranks:
        validation.load_balancing_share(logits, experts)
        T, E = logits.shape
        if check_values(experts):
            moe_mlp_values(experts, E, "load_balancing_share")
        ranks.agree({"E": E, "k": experts.shape[1]}, logits.device)
    chosen = experts.flatten().long()
    one = torch.ones_like(chosen)  # float32 cannot count beyond 2^24
    told = torch.cat([chosen.new_zeros(E).index_add(0, chosen, one), chosen.new_full((1,), T)])
    total = ranks.all_gather(told).wait().sum(0)
    dtype = accumulation_dtype(logits.dtype)
    m = logits.softmax(-1, dtype=dtype).sum(0)
    return (total[:E].to(dtype) * m).sum() / (E * total[E].clamp(min=1).to(dtype) ** 2)
