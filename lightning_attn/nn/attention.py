"""The attention layer, with the parameter names of the released MiniMax checkpoints."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import decay, validation
from ..functional import lightning_attention, lightning_attention_decode
from .norm import GatedRMSNorm


class LightningAttention(nn.Module):
    """The linear-attention layer of MiniMax-Text-01 (arXiv 2501.08313).

        q | k | v = SiLU(qkv_proj(x))                      per head
        y = out_proj(norm(attention(q, k, v)) * sigmoid(output_gate(x)))

    with decay `lightning_attn.decay.minimax(num_heads, layer_idx, num_layers)`, scale 1, the norm over all
    heads together and no biases. The decay is in no state_dict and stays float32 whatever the module's dtype.
    """

    decay: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        *,
        layer_idx: int,
        num_layers: int,
        norm_eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size, self.num_heads, self.head_dim = hidden_size, num_heads, head_dim
        self.layer_idx, self.num_layers = layer_idx, num_layers
        inner = num_heads * head_dim
        self.qkv_proj = nn.Linear(hidden_size, 3 * inner, bias=False, device=device, dtype=dtype)
        self.output_gate = nn.Linear(hidden_size, inner, bias=False, device=device, dtype=dtype)
        self.norm = GatedRMSNorm(inner, eps=norm_eps, device=device, dtype=dtype)
        self.out_proj = nn.Linear(inner, hidden_size, bias=False, device=device, dtype=dtype)
        self.register_buffer("decay", self._decay(device), persistent=False)
        self.register_load_state_dict_post_hook(_materialize_decay)

    def forward(
        self,
        x: Tensor,
        *,
        state: Tensor | None = None,
        return_state: bool = False,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Applies the layer.

        Args:
            x: [B, T, hidden_size].
            state: [N, H, D, D] float32 (float64 for a float64 module), as an earlier call returned it.
            return_state: also return the state after the last token.
            attention_mask: [B, T] of any dtype, nonzero for a real token. Padding, on either side or between tokens, adds
                nothing and decays nothing, whatever x holds there; its outputs are zero.
            cu_seqlens: [N + 1], packed sequences as in `lightning_attention`; excludes attention_mask.
            backend: as for `lightning_attention`.

        Returns:
            y [B, T, hidden_size]; with return_state, (y, state).

        Raises:
            TypeError, ValueError: an argument of the wrong type, dtype, shape or device; attention_mask together
                with cu_seqlens; and all that `lightning_attention` raises.
        """
        shape = (self.num_heads, self.head_dim, self.head_dim)
        validation.layer(x, self.hidden_size, shape, state, attention_mask, cu_seqlens)
        if attention_mask is None:
            y, state = self._attend(x, state, return_state, cu_seqlens, backend)
        else:
            y, state = self._attend_masked(x, state, return_state, attention_mask != 0, backend)
        return y if state is None else (y, state)

    def decode(
        self, x: Tensor, state: Tensor, *, slots: Tensor | None = None, backend: str = "auto"
    ) -> Tensor:
        """Applies the layer to few new tokens, and updates a pool of states in place.

        Args:
            x: [B, T, hidden_size], T = 1 typically.
            state: [S, H, D, D], slots: [B], backend: as for `lightning_attention_decode`.

        Returns:
            y [B, T, hidden_size].

        Raises:
            TypeError, ValueError: as `lightning_attention_decode`, also if anything requires grad while grad mode is on.
        """
        validation.layer(x, self.hidden_size, (self.num_heads, self.head_dim, self.head_dim))
        o = lightning_attention_decode(*self.project(x), self.decay, state, slots=slots, backend=backend)
        return self.output(x, o, backend)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [B, T, H, D] of x [B, T, hidden_size]: what comes before the attention."""
        B, T, _ = x.shape
        q, k, v = F.silu(self.qkv_proj(x)).view(B, T, self.num_heads, 3 * self.head_dim).chunk(3, dim=-1)
        return q, k, v

    def output(self, x: Tensor, o: Tensor, backend: str = "auto") -> Tensor:
        """y [B, T, hidden_size] of x and the attention's o [B, T, H, D]: what comes after it."""
        return self.out_proj(self.norm(o.flatten(2), self.output_gate(x), backend=backend))

    def _attend(
        self, x: Tensor, state: Tensor | None, return_state: bool, cu_seqlens: Tensor | None, backend: str
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = self.project(x)
        result = lightning_attention(
            q,
            k,
            v,
            self.decay,
            initial_state=state,
            return_state=return_state,
            cu_seqlens=cu_seqlens,
            backend=backend,
        )
        o, state = result if isinstance(result, tuple) else (result, None)
        return self.output(x, o, backend), state

    def _attend_masked(
        self, x: Tensor, state: Tensor | None, return_state: bool, mask: Tensor, backend: str
    ) -> tuple[Tensor, Tensor | None]:
        """Packs the real tokens of each sequence, then all padding as a document of its own, whose state is
        dropped: no shape depends on the mask, and nothing waits for the device.
        """
        B, T, hidden = x.shape
        x = x.masked_fill(~mask[..., None], 0)  # or a NaN there would reach the gradients of the weights
        sequence = torch.arange(B, device=x.device)[:, None].expand(B, T)
        order = torch.where(mask, sequence, B).flatten().argsort(stable=True)
        cu_seqlens = F.pad(mask.sum(1), (1, 1)).cumsum(0)
        cu_seqlens[-1] = B * T
        if state is not None:
            state = torch.cat([state, state.new_zeros(1, *state.shape[1:])])
        packed = x.view(1, B * T, hidden).index_select(1, order)
        packed, state = self._attend(packed, state, return_state, cu_seqlens, backend)
        y = torch.empty_like(packed).index_copy(1, order, packed)
        return y.view(B, T, hidden), None if state is None else state[:B]

    def _decay(self, device: torch.device | str | None) -> Tensor:
        return decay.minimax(self.num_heads, self.layer_idx, self.num_layers, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LightningAttention":
        # .to(dtype) would round the decay, and to_empty() would leave it unwritten.
        decay = self.decay
        super()._apply(fn, recurse)
        device = self.decay.device
        self.decay = self._decay(device) if decay.is_meta else decay.to(device)
        return self

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, num_heads={self.num_heads}, head_dim={self.head_dim}, "
            f"layer_idx={self.layer_idx}, num_layers={self.num_layers}"
        )


def _materialize_decay(module: LightningAttention, incompatible_keys: Any) -> None:
    """After load_state_dict(assign=True) into a module made on the meta device."""
    if module.decay.is_meta:
        module.decay = module._decay(module.norm.weight.device)
