"""The vision tower of MiniMax-VL-01: a ViT in CLIP's layout, with its parameter names in the released checkpoint."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import VisionConfig

# Tiles that go through the network together: bounds its activations, 16 x 577 x 4096 at most.
TILES_AT_ONCE = 16


class VisionTower(nn.Module):
    """tiles [N, 3, S, S] -> features [N, P, D] in the weights' dtype, P = (S / patch_size)^2 patches by rows.

        x = pre_layrnorm([class_embedding; patches] + position_embedding)
        x = x + attention(layer_norm1(x));  x = x + fc2(gelu(fc1(layer_norm2(x))))        for each layer

    The features are the last layer's output as it is (no post_layernorm) less the class token. Raises ValueError for tiles
    of another shape.
    """

    def __init__(
        self,
        config: VisionConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.vision_model = _Transformer(config, device, dtype)

    def forward(self, tiles: Tensor) -> Tensor:
        S = self.config.image_size
        if tiles.ndim != 4 or tiles.shape[1:] != (3, S, S):
            raise ValueError(f"VisionTower: expected tiles [N, 3, {S}, {S}], got {list(tiles.shape)}")
        weight = self.vision_model.embeddings.patch_embedding.weight
        batches = tiles.split(TILES_AT_ONCE)  # also of no tiles: one empty batch
        return torch.cat([self.vision_model(batch.to(weight.device, weight.dtype)) for batch in batches])


class _Transformer(nn.Module):
    def __init__(
        self, config: VisionConfig, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config, device, dtype)
        # The checkpoint spells it so.
        self.pre_layrnorm = nn.LayerNorm(
            config.hidden_size, config.layer_norm_eps, device=device, dtype=dtype
        )
        self.encoder = _Encoder(config, device, dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.encoder(self.pre_layrnorm(self.embeddings(pixels)))[:, 1:]


class _Encoder(nn.Module):
    def __init__(
        self, config: VisionConfig, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config, device, dtype) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)  # [N, 1 + P, D]
        return x


class _Embeddings(nn.Module):
    def __init__(
        self, config: VisionConfig, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        D, p = config.hidden_size, config.patch_size
        patches = (config.image_size // p) ** 2
        self.class_embedding = nn.Parameter(torch.randn(D, device=device, dtype=dtype) * D**-0.5)
        self.patch_embedding = nn.Conv2d(3, D, p, stride=p, bias=False, device=device, dtype=dtype)
        self.position_embedding = nn.Embedding(1 + patches, D, device=device, dtype=dtype)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # [N, P, D], by rows
        first = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class _Layer(nn.Module):
    def __init__(
        self, config: VisionConfig, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = nn.LayerNorm(D, eps, device=device, dtype=dtype)
        self.self_attn = _Attention(D, config.num_attention_heads, device, dtype)
        self.layer_norm2 = nn.LayerNorm(D, eps, device=device, dtype=dtype)
        self.mlp = _MLP(D, config.intermediate_size, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Attention(nn.Module):
    def __init__(
        self, dim: int, heads: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.k_proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.v_proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.out_proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [N, H, 1 + P, d]
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(
        self, dim: int, inner: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, inner, device=device, dtype=dtype)
        self.fc2 = nn.Linear(inner, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))
