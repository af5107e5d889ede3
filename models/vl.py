"""MiniMax-VL-01: pictures through the vision tower and a projector into the text model's embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import Cache
from .config import VLConfig
from .image import ProcessedImage, best_grid, image_tokens, unpadded
from .text import CausalLM
from .vision import VisionTower


class Projector(nn.Module):
    """y = linear_2(gelu(linear_1(x))): a patch's features [..., vision hidden] -> [..., text hidden]."""

    def __init__(
        self,
        vision_size: int,
        text_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_size, text_size, device=device, dtype=dtype)
        self.linear_2 = nn.Linear(text_size, text_size, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))


class VLForConditionalGeneration(nn.Module):
    """The whole model, with the checkpoint's names: vision_tower, multi_modal_projector, image_newline, language_model.

    `images` is what `ImageProcessor` gives, in the order of their placeholders, row after row of input_ids. Each picture's
    placeholder is the image token repeated once for each of its tokens (`image_tokens`), in one run.
    """

    def __init__(
        self,
        config: VLConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        D = config.text.hidden_size
        self.vision_tower = VisionTower(config.vision, device=device, dtype=dtype)
        self.multi_modal_projector = Projector(config.vision.hidden_size, D, device=device, dtype=dtype)
        self.image_newline = nn.Parameter(torch.randn(D, device=device, dtype=dtype) * D**-0.5)
        self.language_model = CausalLM(config.text, device=device, dtype=dtype)

    def new_cache(self, batch_size: int, *, rollback: bool = True) -> Cache:
        """An empty `Cache` for generation."""
        return self.language_model.new_cache(batch_size, rollback=rollback)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        images: Sequence[ProcessedImage] | ProcessedImage | None = None,
        inputs_embeds: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """input_ids [B, T] and the pictures in them, or inputs_embeds [B, T, D] from `embed` -> logits, as of
        `CausalLM.forward`, which takes the options (attention_mask, cu_seqlens, cache, …).

        Raises ValueError as `embed`, and for pictures beside inputs_embeds.
        """
        if inputs_embeds is not None:
            if images:
                raise ValueError("images: expected none beside inputs_embeds, which has them already")
        elif input_ids is not None and (images or input_ids.shape[-1] > 1):  # one token may be sampled: any
            inputs_embeds, input_ids = self.embed(input_ids, images), None
        return self.language_model(input_ids, inputs_embeds=inputs_embeds, **options)

    def embed(
        self, input_ids: Tensor, images: Sequence[ProcessedImage] | ProcessedImage | None = None
    ) -> Tensor:
        """input_ids [B, T] -> inputs_embeds [B, T, D]: the text's embeddings, with the pictures' tokens in place of the
        placeholders.

        Raises ValueError for an id outside the vocabulary (where they are on a CPU), tiles that do not fit a picture's
        size, and placeholders that do not fit the pictures, saying for each what was expected and what came.
        """
        if isinstance(images, ProcessedImage):
            images = [images]
        embeds = self.language_model.model.embed(input_ids)
        is_image = (input_ids == self.config.image_token_id).to(embeds.device)
        self._check(is_image, images or [])
        if not images:
            return embeds
        return embeds.masked_scatter(is_image[..., None], torch.cat(self.features(images)).to(embeds))

    def features(self, images: Sequence[ProcessedImage]) -> list[Tensor]:
        """Each picture's tokens [image_tokens, D], as they take the place of its placeholders."""
        counts = [len(image.tiles) for image in images]
        patches = self.vision_tower(torch.cat([image.tiles for image in images]))  # [tiles, P, vision hidden]
        return [
            self._pack(self.multi_modal_projector(part), image.size)
            for part, image in zip(patches.split(counts), images, strict=True)
        ]

    def _pack(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """x [1 + tiles, P, D] -> [tokens, D]: the thumbnail; the tiles as one grid of patches, without what is padding,
        a newline after each row.
        """
        vision = self.config.vision
        n = vision.image_size // vision.patch_size
        W, H = best_grid(*size, self.config.image_grid_pinpoints)
        across, down = W // vision.image_size, H // vision.image_size
        grid = x[1:].view(down, across, n, n, -1).transpose(1, 2).reshape(down * n, across * n, -1)
        columns, rows = unpadded(*size, across * n, down * n)
        left, top = (across * n - columns) // 2, (down * n - rows) // 2
        grid = grid[top : top + rows, left : left + columns]
        newline = self.image_newline.to(x).expand(rows, 1, -1)
        return torch.cat([x[0], torch.cat([grid, newline], dim=1).flatten(0, 1)])

    def _check(self, is_image: Tensor, images: Sequence[ProcessedImage]) -> None:
        vision, grid = self.config.vision, self.config.image_grid_pinpoints
        expected = []
        for i, image in enumerate(images):
            if not isinstance(image, ProcessedImage):
                raise TypeError(
                    f"images[{i}]: expected what ImageProcessor gives, got {type(image).__name__}"
                )
            if min(image.size) < 1:
                raise ValueError(f"images[{i}]: expected a size of at least 1x1, got {image.size}")
            W, H = best_grid(*image.size, grid)
            n = 1 + (W // vision.image_size) * (H // vision.image_size)
            if len(image.tiles) != n:
                size = "{}x{}".format(*image.size)
                raise ValueError(f"images[{i}]: expected {n} tiles for {size}, got {len(image.tiles)}")
            sizes = {"size": vision.image_size, "patch_size": vision.patch_size}
            expected.append(image_tokens(*image.size, grid=grid, **sizes))
        got = _runs(is_image)
        if not _fill(expected, got):
            names = [
                "{} for images[{}] ({}x{})".format(count, i, *image.size)
                for i, (count, image) in enumerate(zip(expected, images, strict=True))
            ]
            token = self.config.image_token_id
            raise ValueError(
                f"input_ids: expected image tokens (id {token}) in runs of {', '.join(names) or 'none, without images'}, "
                f"got {', '.join(map(str, got)) or 'none'}"
            )


def _runs(mask: Tensor) -> list[int]:
    """Lengths of the runs of True in the rows of mask [B, T], one after the other."""
    edges = F.pad(mask.int(), (1, 1)).diff()
    starts, stops = (edges == 1).nonzero()[:, 1], (edges == -1).nonzero()[:, 1]
    return (stops - starts).tolist()


def _fill(counts: Sequence[int], runs: Sequence[int]) -> bool:
    """Whether each run holds one or more whole pictures, in order: pictures with nothing between them make one run."""
    left = list(counts)
    for run in runs:
        while run > 0 and left:
            run -= left.pop(0)
        if run:
            return False
    return not left
