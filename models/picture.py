"""Any picture -> RGB, 8 bits a channel.

A picture is turned to RGB before it is resized. The released processor resizes in the file's own mode: the same for RGB
and grey, but Pillow takes the nearest pixel where a file has a palette or 1 bit. As there, the orientation in EXIF and
colour profiles are not applied (`PIL.ImageOps.exif_transpose` does the first), and of an animation the first frame counts.
Transparent pixels are composited on black, the colour of the padding: there too, what is wholly transparent is black once
resized.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

MAX_PIXELS = 178_956_970  # where Pillow refuses to decode
# Of Pillow's formats those that pictures come in; others run programs (EPS) or take any bytes for theirs.
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "PPM", "ICO", "JPEG2000")

Source: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Tensor"


def load_image(source: Source, *, max_pixels: int = MAX_PIXELS, name: str = "image") -> Image.Image:
    """A picture in RGB, 8 bits a channel; sources and errors as of `ImageProcessor`. 16-bit grey is scaled to 8."""
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        with open(source, "rb") as file:
            return _decode(file, name, max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(source), name, max_pixels)
    if isinstance(source, Tensor):
        source = source.detach().cpu().numpy()
    if isinstance(source, np.ndarray):
        source = _from_array(source, name)
    if not isinstance(source, Image.Image):
        expected = "a path, bytes, a PIL image or an array"
        raise TypeError(f"{name}: expected {expected}, got {type(source).__name__}")
    return _rgb(source, name, max_pixels)


def _decode(file: Any, name: str, max_pixels: int) -> Image.Image:
    Image.init()  # every plugin that is here
    try:
        with _damage(name):
            image = Image.open(file, formats=[f for f in FORMATS if f in Image.OPEN])
        with image:
            return _rgb(image, name, max_pixels)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(name, max_pixels, "one that Pillow takes for a decompression bomb") from None
    except Image.UnidentifiedImageError:
        expected = f"a picture ({', '.join(FORMATS)})"
        raise ValueError(
            f"{name}: expected {expected}, got no such file; convert it, or fetch it again"
        ) from None


def _rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if not (width and height):
        raise ValueError(f"{name}: expected a picture of at least 1x1 pixels, got {width}x{height}")
    if width * height > max_pixels:  # before anything is decoded
        raise _too_large(name, max_pixels, f"{width}x{height}")
    if image.mode == "F":
        raise ValueError(f"{name}: expected integers, got floating-point pixels; scale them to uint8 0 … 255")
    with _damage(name):
        image.load()
    if image.mode.startswith("I"):
        image = _grey(image, name)
    with _damage(name):
        if image.mode == "La":  # Pillow takes it no further than this
            image = image.convert("LA")
        if image.has_transparency_data:
            black = Image.new("RGBA", image.size, (0, 0, 0, 255))
            image = Image.alpha_composite(black, image.convert("RGBA"))
        return image.convert("RGB")


def _grey(image: Image.Image, name: str) -> Image.Image:
    """16-bit grey -> 8-bit; Pillow would clip it at 255."""
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        got = f"{pixels.min()} … {pixels.max()}"
        raise ValueError(f"{name}: expected grey of at most 16 bits, got {got}; scale it to uint8 0 … 255")
    if isinstance(transparent := image.info.get("transparency"), int):
        pixels[pixels == transparent] = 0
    return Image.fromarray(_eight_bits(pixels))


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or not 1 <= array.shape[2] <= 4:
        shape = tuple(array.shape)
        raise ValueError(f"{name}: expected an array [H, W] or [H, W, C] with C of 1 to 4, got {shape}")
    if 0 in array.shape:
        raise ValueError(
            f"{name}: expected a picture of at least 1x1 pixels, got {array.shape[1]}x{array.shape[0]}"
        )
    if array.dtype == bool:
        array = array * np.uint8(255)
    elif array.dtype == np.uint16:
        array = _eight_bits(array.astype(np.int64))
    elif array.dtype != np.uint8:
        raise TypeError(f"{name}: expected uint8 (0 … 255), uint16 or bool pixels, got {array.dtype}")
    return Image.fromarray(np.ascontiguousarray(array[:, :, 0] if array.shape[2] == 1 else array))


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    return ((pixels + 128) // 257).astype(np.uint8)  # 65535 -> 255, to the nearest


@contextlib.contextmanager
def _damage(name: str) -> Iterator[None]:
    """Pillow's decoders raise errors of many kinds at a damaged file."""
    try:
        yield
    except (
        MemoryError,
        Image.UnidentifiedImageError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ):
        raise
    except Exception as error:
        hint = "it is truncated or damaged; fetch or save it again"
        raise ValueError(
            f"{name}: expected a whole picture, got an error decoding it ({error}): {hint}"
        ) from error


def _too_large(name: str, max_pixels: int, got: str) -> ValueError:
    hint = "scale it down, or raise max_pixels (and PIL.Image.MAX_IMAGE_PIXELS) if it can be trusted"
    return ValueError(f"{name}: expected at most {max_pixels:,} pixels, got {got}; {hint}")
