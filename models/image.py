"""Images for MiniMax-VL-01: any picture -> normalised tiles, and how many tokens it takes.

width, height -> the best of 28 sizes; the picture is resized into it, centred on black and cut in tiles of 336 x 336;
before them goes the thumbnail, the whole picture squeezed to 336 x 336. The released rules stop with an error where a side
rounds to 0 pixels; it is 1 here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .config import VLConfig
from .fields import pairs
from .picture import MAX_PIXELS, Source, load_image

GRID = VLConfig().image_grid_pinpoints  # 28 sizes (width, height)


class ProcessedImage(NamedTuple):
    """tiles [1 + n, 3, S, S] float32, normalised: the thumbnail, then the grid's tiles by rows; size (width, height) of the
    picture as it was.
    """

    tiles: Tensor
    size: tuple[int, int]


def best_grid(width: int, height: int, grid: Sequence[tuple[int, int]] = GRID) -> tuple[int, int]:
    """The size (W, H) of `grid` that keeps most of a picture's pixels, then wastes least; the first of equals."""

    def merit(size: tuple[int, int]) -> tuple[int, int]:
        # In floating point as released, where int() may fall one pixel short.
        scale = min(size[0] / width, size[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - size[0] * size[1]

    return max(grid, key=merit)


def fitted(width: int, height: int, W: int, H: int) -> tuple[int, int]:
    """The size of a picture resized to fill W x H on one side; at least 1 pixel on the other."""
    if width * H > W * height:
        return W, max(1, W * height // width)
    return max(1, H * width // height), H


def unpadded(width: int, height: int, columns: int, rows: int) -> tuple[int, int]:
    """Columns and rows of a grid of patches without those that show padding only: as many go on both sides. Of a picture
    with an aspect ratio beyond 144 none is left: the model sees its thumbnail only.
    """
    if width * rows > columns * height:
        return columns, rows - (rows - height * columns // width) // 2 * 2
    return columns - (columns - width * rows // height) // 2 * 2, rows


def image_tokens(
    width: int,
    height: int,
    *,
    grid: Sequence[tuple[int, int]] = GRID,
    size: int = 336,
    patch_size: int = 14,
) -> int:
    """How many tokens a picture of width x height takes: the thumbnail's, and each row of the grid's patches with a newline.

    Raises ValueError if a side is below 1.
    """
    if not (width >= 1 and height >= 1):
        raise ValueError(f"image_tokens: expected width and height >= 1, got {width}x{height}")
    W, H = best_grid(width, height, grid)
    columns, rows = unpadded(width, height, W // patch_size, H // patch_size)
    return (size // patch_size) ** 2 + (columns + 1) * rows


@dataclass(frozen=True, kw_only=True)
class ImageProcessor:
    """The image processor of MiniMax-VL-01; the fields are those of its preprocessor_config.json, the defaults the
    released values, and `max_pixels` the largest picture that is decoded.

        processor(picture) -> ProcessedImage        processor([picture, …]) -> [ProcessedImage, …]

    A picture is a path, a file's bytes, a PIL image, or an array [H, W] or [H, W, C] of uint8, uint16 or bool with
    C = 1 (grey), 2 (and alpha), 3 (RGB) or 4 (and alpha). Raises ValueError for what is no picture, is truncated, empty or
    too large, naming it; OSError if a file cannot be read; TypeError for anything else.
    """

    image_grid_pinpoints: tuple[tuple[int, int], ...] = GRID
    size: int = 336
    patch_size: int = 14
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        _expect(
            self.size >= 1 and self.patch_size >= 1, "size and patch_size >= 1", (self.size, self.patch_size)
        )
        _expect(
            self.size % self.patch_size == 0, f"size divisible by patch_size = {self.patch_size}", self.size
        )
        _expect(len(self.image_grid_pinpoints) > 0, "image_grid_pinpoints of at least one size", "none")
        for pair in self.image_grid_pinpoints:
            whole = len(pair) == 2 and all(side >= 1 and side % self.size == 0 for side in pair)
            _expect(whole, f"image_grid_pinpoints (width, height) in multiples of size = {self.size}", pair)
        _expect(
            len(self.image_mean) == len(self.image_std) == 3, "image_mean and image_std of 3 numbers", self
        )
        _expect(all(std > 0 for std in self.image_std), "image_std > 0", self.image_std)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ImageProcessor:
        """From the fields of a preprocessor_config.json. Raises ValueError for what is unknown or not implemented."""
        given = {name: value for name, value in fields.items() if name not in _INERT}
        for name, only in _ONLY.items():
            value = given.pop(name, only)
            _expect(value in (only, None), f"{name} = {only!r} (nothing else is implemented)", value)
        if "image_grid_pinpoints" in given:
            given["image_grid_pinpoints"] = pairs(given["image_grid_pinpoints"])
        for name in ("size", "crop_size"):
            if name in given:
                given[name] = _side(name, given[name])
        size = given.get("size", cls.size)
        crop = given.pop("crop_size", size)
        _expect(crop == size, f"crop_size = size = {size}", crop)
        for name in ("image_mean", "image_std"):
            if name in given:
                given[name] = tuple(given[name])
        unknown = sorted(set(given) - {field.name for field in dataclasses.fields(cls)})
        _expect(not unknown, "the fields of a preprocessor_config.json", f"unknown {', '.join(unknown)}")
        return cls(**given)

    @classmethod
    def from_file(cls, path: str | Path) -> ImageProcessor:
        """`path`: a preprocessor_config.json, or a directory that has one."""
        path = Path(path)
        file = path / "preprocessor_config.json" if path.is_dir() else path
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"ImageProcessor: expected JSON in {file}, got {error}") from None
        _expect(isinstance(fields, dict), f"a JSON object in {file}", type(fields).__name__)
        return cls.from_dict(fields)

    def tokens(self, width: int, height: int) -> int:
        """`image_tokens` with this processor's sizes."""
        return image_tokens(
            width, height, grid=self.image_grid_pinpoints, size=self.size, patch_size=self.patch_size
        )

    def __call__(self, images: Source | Sequence[Source]) -> ProcessedImage | list[ProcessedImage]:
        if isinstance(images, (list, tuple)):
            return [self._process(image, f"images[{i}]") for i, image in enumerate(images)]
        return self._process(images, "image")  # type: ignore[arg-type]

    def _process(self, source: Source, name: str) -> ProcessedImage:
        image = load_image(source, max_pixels=self.max_pixels, name=name)
        S, (W, H) = self.size, best_grid(*image.size, self.image_grid_pinpoints)
        w, h = fitted(*image.size, W, H)
        canvas = Image.new("RGB", (W, H))  # black, before normalisation
        canvas.paste(image.resize((w, h), Image.Resampling.BICUBIC), ((W - w) // 2, (H - h) // 2))
        thumbnail = image.resize((S, S), Image.Resampling.BICUBIC)
        grid = torch.from_numpy(np.array(canvas)).view(H // S, S, W // S, S, 3)
        grid = grid.permute(0, 2, 4, 1, 3).reshape(-1, 3, S, S)  # [n, C, y, x]
        first = torch.from_numpy(np.array(thumbnail)).permute(2, 0, 1)[None]
        tiles = torch.cat([first, grid]).to(torch.float32).div_(255)
        mean, std = (torch.tensor(x)[:, None, None] for x in (self.image_mean, self.image_std))
        return ProcessedImage(tiles.sub_(mean).div_(std), image.size)


# Fields of a preprocessor_config.json that say nothing of the pixels, and those of which one value is implemented.
_INERT = {
    "auto_map",
    "data_format",
    "default_to_square",
    "do_center_crop",
    "do_pad",
    "feature_extractor_type",
    "image_processor_type",
    "processor_class",
}
_ONLY: dict[str, Any] = {
    "process_image_mode": "anyres",
    "resample": int(Image.Resampling.BICUBIC),
    "rescale_factor": 1 / 255,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
}


def _side(name: str, value: Any) -> int:
    """336, [336, 336], {"height": 336, "width": 336} or {"shortest_edge": 336} -> 336."""
    sides = list(value.values()) if isinstance(value, Mapping) else value
    sides = sides if isinstance(sides, (list, tuple)) else [sides]
    _expect(1 <= len(sides) <= 2 and len(set(sides)) == 1, f"{name} of a square", value)
    _expect(type(sides[0]) is int, f"{name} of integers", value)
    return sides[0]


def _expect(condition: bool, expected: str, got: Any) -> None:
    if not condition:
        raise ValueError(f"ImageProcessor: expected {expected}, got {got}")
