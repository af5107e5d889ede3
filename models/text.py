"""MiniMax-Text-01 (arXiv 2501.08313): the whole network, parameters named as in the released checkpoint.

    h = norm_in(x);  y = alpha h + beta attention(h);  z = norm_post(y);  x' = alpha z + beta experts(z)

The residual is the normed tensor. Seven layers of lightning attention, one of softmax attention, ten times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lightning_attn import LightningAttention, SparseMoE

from . import step as steps
from .cache import Cache
from .config import LIGHTNING, TextConfig
from .inputs import check_shapes, check_types
from .softmax import SoftmaxAttention
from .step import Step

if TYPE_CHECKING:
    from lightning_attn.distributed import ExpertParallel

    from .context import ContextParallel


class DecoderLayer(nn.Module):
    def __init__(self, config: TextConfig, layer: int, **factory: Any) -> None:
        super().__init__()
        self.lightning, self.layer = config.attn_type_list[layer] == LIGHTNING, layer
        kind = "linear" if self.lightning else "full"
        self.attention_alpha = getattr(config, f"layernorm_{kind}_attention_alpha")
        self.attention_beta = getattr(config, f"layernorm_{kind}_attention_beta")
        self.mlp_alpha, self.mlp_beta = config.layernorm_mlp_alpha, config.layernorm_mlp_beta
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(hidden, eps=eps, **factory)
        self.self_attn: LightningAttention | SoftmaxAttention
        if self.lightning:
            heads, L = config.num_attention_heads, config.num_hidden_layers
            self.self_attn = LightningAttention(
                hidden, heads, config.head_dim, layer_idx=layer, num_layers=L, **factory
            )
        else:
            self.self_attn = SoftmaxAttention(config, **factory)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=eps, **factory)
        self.block_sparse_moe: SparseMoE | ExpertParallel = SparseMoE(
            hidden, config.intermediate_size, config.num_local_experts, config.num_experts_per_tok, **factory
        )

    def forward(self, x: Tensor, step: Step, cache: Cache | None, backend: str) -> tuple[Tensor, Tensor]:
        """x [B, T, hidden] -> (x' [B, T, hidden], router logits [B T, experts])."""
        h = self.input_layernorm(x)
        y = self.attention_alpha * h + self.attention_beta * self._attend(h, step, cache, backend)
        z = self.post_attention_layernorm(y)
        experts, logits = self.block_sparse_moe(z, return_router_logits=True, backend=backend)
        return self.mlp_alpha * z + self.mlp_beta * experts, logits

    def _attend(self, h: Tensor, step: Step, cache: Cache | None, backend: str) -> Tensor:
        attention = self.self_attn
        if step.context is not None:
            return step.context.attend(attention, h, step, self.layer, backend)
        if isinstance(attention, SoftmaxAttention):
            return attention(h, step, None if cache is None else cache.softmax[self.layer])
        if cache is None:
            return attention(h, attention_mask=step.mask, cu_seqlens=step.cu_seqlens, backend=backend)
        state = cache.state(self.layer, h)  # [B, H, D, D]
        if h.shape[1] == 1:
            return attention.decode(h, state, slots=step.slots, backend=backend)
        y, after = attention(h, state=state, return_state=True, attention_mask=step.mask, backend=backend)
        state.copy_(after)
        return y


class TextModel(nn.Module):
    """Embeddings, layers and the last norm. Layers may lie on different devices, in order."""

    def __init__(
        self,
        config: TextConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, **factory)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, **factory) for i in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **factory)
        initialize(self, config.initializer_range)

    def new_cache(self, batch_size: int, *, rollback: bool = True) -> Cache:
        return Cache(self.config, batch_size, rollback=rollback)

    def embed(self, input_ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, hidden]. Raises ValueError for ids outside the vocabulary, where they are on a CPU."""
        if input_ids.dim() != 2 or input_ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"TextModel: expected input_ids [B, T] int64, got {list(input_ids.shape)} {input_ids.dtype}"
            )
        size = self.config.vocab_size
        if input_ids.device.type == "cpu" and input_ids.numel():
            outside = ((input_ids < 0) | (input_ids >= size)).nonzero()
            if len(outside):
                b, t = outside[0].tolist()
                raise ValueError(
                    f"TextModel: expected input_ids in [0, {size}), got {int(input_ids[b, t])} at row {b}, token {t}: "
                    "is this the tokenizer of another model?"
                )
        return self.embed_tokens(input_ids.to(self.embed_tokens.weight.device))

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
        context: ContextParallel | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The hidden states after the last norm, and each layer's router logits.

        Args:
            input_ids: [B, T] int64; or inputs_embeds: [B, T, hidden].
            attention_mask: [B, T], nonzero for real tokens, of the new tokens alone; padding may stand anywhere.
            cu_seqlens: [N + 1], with B = 1: offsets of packed documents, which do not see each other.
            cache: what came before; takes the new tokens, without gradients. Excludes cu_seqlens.
            context: of a packed sequence that lies on several ranks; the inputs are this rank's, B = 1. Excludes the three above.
            backend: as for `lightning_attn.lightning_attention`.

        Returns:
            (hidden [B, T, hidden], router logits, a [tokens, experts] for each layer). Rows of padding mean nothing.

        Raises:
            TypeError, ValueError: arguments that contradict each other, of wrong shapes, or ids outside the vocabulary.
        """
        check_types(input_ids, inputs_embeds, attention_mask, cu_seqlens, cache, context, backend)
        with gradients(cache):
            x = inputs_embeds if input_ids is None else self.embed(input_ids)
            assert x is not None
            dtype, packed = self.embed_tokens.weight.dtype, cu_seqlens is not None or context is not None
            check_shapes(x, attention_mask, cu_seqlens, cache, self.config, dtype, packed)
            x, mask, T = x.to(self.embed_tokens.weight.device), attention_mask, x.shape[1]
            if cache is not None and cache.pending is not None:  # what crop left to be run again
                x, mask = _prepend(cache.pending, x, mask)
            if context is None:
                step = self._step(x, mask, cu_seqlens, cache)
            else:
                step = context.step(self.config, x.shape[1], x.device)
            if step.mask is not None:  # whatever stands in padding, it must not turn into NaN
                x = x.masked_fill(~step.mask[..., None], 0)
            if cache is not None:
                cache.begin(x, step)
            router = []
            for layer in cast("list[DecoderLayer]", self.layers):
                device = layer.input_layernorm.weight.device
                x, step = x.to(device), step.to(device)
                x, logits = layer(x, step, cache, backend)
                router.append(logits.unflatten(0, x.shape[:2])[:, x.shape[1] - T :].flatten(0, 1))
            if cache is not None:
                cache.end(step)
            return self.norm(x.to(self.norm.weight.device))[:, x.shape[1] - T :], tuple(router)

    def _step(self, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, cache: Cache | None) -> Step:
        starts = None if cache is None else tuple(cache.stored)
        B, T, _ = x.shape
        rope = self.config.rotary_dim, self.config.rope_theta
        return steps.build(B, T, *rope, device=x.device, starts=starts, mask=mask, cu_seqlens=cu_seqlens)


class Head(nn.Module):
    """What the models with a head have in common."""

    def __init__(
        self, config: TextConfig, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.config = config
        self.model = TextModel(config, device=device, dtype=dtype)

    def new_cache(self, batch_size: int, *, rollback: bool = True) -> Cache:
        """An empty `Cache` for generation."""
        return self.model.new_cache(batch_size, rollback=rollback)


class CausalLM(Head):
    """The language model, with an untied head."""

    def __init__(
        self,
        config: TextConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, device, dtype)
        self.lm_head = nn.Linear(
            config.hidden_size, config.vocab_size, bias=False, device=device, dtype=dtype
        )
        initialize(self.lm_head, config.initializer_range)

    def forward(
        self, input_ids: Tensor | None = None, *, return_router_logits: bool = False, **inputs: Any
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """Logits [B, T, vocab] of the next token; arguments as of `TextModel.forward`. With return_router_logits
        (logits, router logits), for the auxiliary loss.
        """
        hidden, router = self.model(input_ids, **inputs)
        with gradients(inputs.get("cache")):
            logits = self.lm_head(hidden.to(self.lm_head.weight.device))
        return (logits, router) if return_router_logits else logits


def gradients(cache: Cache | None) -> torch.set_grad_enabled:
    """What a cache takes has no gradient."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and cache is None)


@torch.no_grad()
def initialize(module: nn.Module, std: float) -> None:
    """Normal weights of deviation std (initializer_range), norms of one, no bias."""
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=std)
        elif name.endswith("bias"):
            parameter.zero_()


def _prepend(pending: tuple[Tensor, Tensor], x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    before, real = pending
    new = (
        torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask.to(x.device) != 0
    )
    return torch.cat([before.to(x), x], dim=1), torch.cat([real, new], dim=1)
