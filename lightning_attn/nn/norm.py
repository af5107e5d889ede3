"""The gated norm as a module."""

import torch
from torch import Tensor, nn

from ..functional import gated_rms_norm


class GatedRMSNorm(nn.Module):
    """y = RMSNorm(x) * weight * sigmoid(gate), over the last dimension: see `gated_rms_norm`."""

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor, gate: Tensor, backend: str = "auto") -> Tensor:
        return gated_rms_norm(x, gate, self.weight, eps=self.eps, backend=backend)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
