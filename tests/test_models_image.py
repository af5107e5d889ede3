"""The image processor: sizes, tiles and token counts against the rules written out, on photographs and on every size; every
odd kind of picture gives a right result or a clear error.
"""

import importlib.util
import io
import itertools
import json
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from models.config import VLConfig
from models.image import GRID, ImageProcessor, ProcessedImage, best_grid, image_tokens, load_image

PHOTOS = Path(importlib.util.find_spec("skimage").origin).parent / "data"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = [
    (1, 1), (2, 1), (1, 3), (8000, 200), (200, 8000), (8000, 1), (1, 8000), (4000, 3), (7, 2500), (336, 336), (337, 336),
    (335, 337), (640, 480), (480, 641), (1008, 2016), (2016, 337), (1999, 1345), (100, 99), (673, 2017), (1000, 31),
]  # fmt: skip
processor = ImageProcessor()


MOST = {
    336: 2016,
    672: 2016,
    1008: 2016,
    1344: 1344,
    1680: 1008,
    2016: 1008,
}  # width: the grid's greatest height


def plain_grid(w, h, grid=None):
    best, kept, wasted = None, -1, None
    for W, H in grid or [(W, H) for W in MOST for H in MOST if H <= MOST[W]]:
        scale = min(W / w, H / h)
        keep = min(int(w * scale) * int(h * scale), w * h)
        waste = W * H - keep
        if keep > kept or keep == kept and waste < wasted:
            best, kept, wasted = (W, H), keep, waste
    return best


def plain_tokens(w, h):
    cw, ch = (side // 14 for side in plain_grid(w, h))
    if w / h > cw / ch:
        ch -= 2 * ((ch - (h * cw) // w) // 2)
    else:
        cw -= 2 * ((cw - (w * ch) // h) // 2)
    return (cw + 1) * ch + 576


def plain_tiles(image):
    """[1 + n, 3, 336, 336] in float64; image in RGB."""
    w, h = image.size
    W, H = plain_grid(w, h)
    size = (W, max(1, int(W * h / w))) if w / h > W / H else (max(1, int(H * w / h)), H)
    x, y = (W - size[0]) // 2, (H - size[1]) // 2
    canvas = np.zeros((H, W, 3))
    canvas[y : y + size[1], x : x + size[0]] = np.asarray(image.resize(size, Image.BICUBIC))
    tiles = [np.asarray(image.resize((336, 336), Image.BICUBIC)).astype(float)]
    for row, column in itertools.product(range(H // 336), range(W // 336)):
        tiles.append(canvas[row * 336 : row * 336 + 336, column * 336 : column * 336 + 336])
    return np.stack([((tile / 255 - MEAN) / STD).transpose(2, 0, 1) for tile in tiles])


def noise(w, h, channels=3):
    pixels = np.random.default_rng(w * 10007 + h).integers(0, 256, (h, w, channels), dtype=np.uint8)
    return Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photo(name="astronaut.png"):
    return Image.open(PHOTOS / name)


def same(source, image):
    """The picture that `source` is read as has the pixels of `image`."""
    read = load_image(source)
    assert read.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(read), np.asarray(image))


def test_tokens_of_known_sizes():
    known = {(336, 336): 1176, (640, 480): 2340, (1024, 768): 7560, (1920, 1080): 9864, (1008, 2016): 11088}
    for (w, h), tokens in known.items():
        assert image_tokens(w, h) == plain_tokens(w, h) == processor.tokens(w, h) == tokens
    assert len(GRID) == len(set(GRID)) == 28 and GRID == VLConfig().image_grid_pinpoints


def test_tokens_of_any_size():
    """Small sizes one by one, others at random, sizes in the grid's proportions; none takes more than 11,088 tokens."""
    draw = random.Random(0)
    sizes = [*itertools.product(range(1, 13), repeat=2), *SIZES]
    sizes += [(draw.randint(1, 8000), draw.randint(1, 8000)) for _ in range(700)]
    sizes += [(W * n + d, H * n) for W, H in GRID for n in (1, 3) for d in (-1, 0, 1)]
    tokens = [image_tokens(w, h) for w, h in sizes]
    assert tokens == [plain_tokens(w, h) for w, h in sizes]
    assert max(tokens) == 11088 and min(tokens) == 576
    for size in ((0, 5), (5, 0), (-1, 3)):
        with pytest.raises(ValueError, match="expected width and height >= 1, got"):
            image_tokens(*size)


def test_grid_in_another_order():
    """Of sizes that keep as many pixels the smallest, then the first."""
    draw = random.Random(0)
    for _ in range(300):
        grid, size = draw.sample(GRID, 12), (draw.randint(1, 2500), draw.randint(1, 2500))
        assert best_grid(*size, grid) == plain_grid(*size, grid)


@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
def test_tiles_of_any_size(size):
    image = noise(*size)
    tiles, original = processor(image)
    assert original == size and tiles.dtype == torch.float32 and tiles.is_contiguous()
    np.testing.assert_allclose(tiles.numpy(), plain_tiles(image), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["astronaut.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png", "page.png"]
)
def test_tiles_of_photographs(name):
    """From a path, as bytes, as an array, as a tensor and opened: the same."""
    path = PHOTOS / name
    rgb = photo(name).convert("RGB")
    tiles, size = processor(path)
    assert size == rgb.size
    np.testing.assert_allclose(tiles.numpy(), plain_tiles(rgb), rtol=1e-5, atol=1e-6)
    array = np.array(photo(name))
    for source in (str(path), path.read_bytes(), array, torch.from_numpy(array), photo(name)):
        same(source, rgb)


def test_a_list_is_its_pictures():
    paths = [PHOTOS / "coffee.png", PHOTOS / "camera.png"]
    both = processor(paths)
    assert isinstance(both, list) and processor([]) == []
    for path, together in zip(paths, both, strict=True):
        alone = processor(path)
        assert isinstance(alone, ProcessedImage) and alone.size == together.size
        assert torch.equal(alone.tiles, together.tiles)


def test_cmyk_and_other_colours():
    rgb = photo().convert("RGB")
    cmyk = saved(rgb.convert("CMYK"), "JPEG")
    assert Image.open(io.BytesIO(cmyk)).mode == "CMYK"
    same(cmyk, Image.open(io.BytesIO(cmyk)).convert("RGB"))
    assert (
        np.abs(np.asarray(load_image(cmyk), float) - np.asarray(rgb)).mean() < 4
    )  # colours, not their negative
    for mode in ("YCbCr", "HSV", "RGBX", "L"):
        same(rgb.convert(mode), rgb.convert(mode).convert("RGB"))


def test_palette():
    """Resized as the colours that it stands for, whatever the file's form; a transparent entry is black."""
    flat = photo().convert("RGB").quantize(7)
    assert torch.equal(processor(saved(flat, "PNG")).tiles, processor(flat.convert("RGB")).tiles)
    pixels = np.array(flat.convert("RGB"))
    pixels[np.asarray(flat) == 3] = 0
    same(saved(flat, "PNG", transparency=3), pixels)
    same(saved(flat, "PNG", transparency=bytes([255, 255, 255, 0])), pixels)


def test_sixteen_bits():
    """Scaled to 8 bits, not clipped at 255."""
    grey = np.random.default_rng(0).integers(0, 2**16, (40, 50)).astype(np.uint16)
    grey[0, :4] = 0, 128, 129, 65535
    expected = np.rint(grey / 257).astype(np.uint8)
    assert expected[0, :4].tolist() == [0, 0, 1, 255]
    expected = np.repeat(expected[:, :, None], 3, 2)
    image = Image.fromarray(grey)
    big_endian = Image.frombytes("I;16B", image.size, grey.astype(">u2").tobytes())
    wide = Image.fromarray(grey.astype(np.int32))
    sources = [image, big_endian, wide, grey, saved(image, "PNG"), saved(image, "TIFF"), saved(wide, "PPM")]
    for source in sources:
        same(source, expected)
    expected[grey == grey[7, 7]] = 0
    same(saved(image, "PNG", transparency=int(grey[7, 7])), expected)
    for pixels in (np.full((2, 2), 70000, np.int32), np.full((2, 2), -1, np.int32)):
        with pytest.raises(ValueError, match="expected grey of at most 16 bits, got"):
            load_image(Image.fromarray(pixels))
    with pytest.raises(ValueError, match="expected integers, got floating-point"):
        load_image(Image.fromarray(np.ones((2, 2), np.float32)))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_over_black(mode):
    image = noise(40, 30, 4).convert(mode)
    pixels = np.asarray(image.convert("RGBA")).astype(float)
    expected = np.rint(pixels[:, :, :3] * pixels[:, :, 3:] / 255)
    for source in (image, saved(image, "PNG"), np.array(image)):
        read = np.asarray(load_image(source)).astype(float)
        assert np.abs(read - expected).max() <= 1
    image.putalpha(255)
    same(image, image.convert("RGB"))
    image.putalpha(0)
    assert not np.asarray(load_image(image)).any()  # what nobody sees the model does not see


def test_one_bit():
    image = photo().convert("1")
    for source in (image, saved(image, "PNG"), saved(image, "TIFF"), np.array(image)):
        same(source, image.convert("RGB"))
    assert torch.equal(processor(image).tiles, processor(image.convert("RGB")).tiles)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animation_is_its_first_frame(kind):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    same(data, frames[0])


def test_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    image = photo("chelsea.png")
    assert processor(saved(image, "JPEG", exif=exif)).size == image.size == (451, 300)
    same(saved(image, "JPEG", exif=exif), load_image(saved(image, "JPEG")))


@pytest.mark.filterwarnings("ignore")  # Pillow's own, about the damage
def test_truncated():
    rgb = photo("chelsea.png").convert("RGB")
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
        data = saved(rgb, kind)
        for part in (0, 1, 20, len(data) // 10, len(data) // 2, len(data) * 9 // 10):
            with pytest.raises(ValueError, match=r"^image: expected .*, got .*again"):
                processor(data[:part])
    with pytest.raises(ValueError, match=r"^images\[1\]: expected .*, got "):
        processor([rgb, data[:100]])


@pytest.mark.filterwarnings("ignore")  # Pillow's own, about the damage
def test_damaged_files_are_read_or_refused(tmp_path):
    """Bytes overwritten at random: a picture, or a ValueError that names the file."""
    draw, refused = random.Random(0), 0
    small = photo("chelsea.png").convert("RGB").resize((60, 40))
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO", "JPEG2000"):
        whole = saved(small, kind)
        for _ in range(25):
            data = bytearray(whole)
            for _ in range(draw.randint(1, 12)):
                data[draw.randrange(min(len(data), draw.choice((40, 400, 10**6))))] = draw.randrange(256)
            path = tmp_path / "broken.img"
            path.write_bytes(data)
            try:
                assert load_image(path, max_pixels=10**6).mode == "RGB"
            except ValueError as error:
                assert str(error).startswith(f"{path}: expected ") and ", got " in str(error)
                refused += 1
    assert refused > 50


def test_no_picture(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("no picture")
    with pytest.raises(
        ValueError, match=r"notes\.txt: expected a picture \(PNG, JPEG, .*got no such file; convert"
    ):
        processor(path)
    with pytest.raises(ValueError, match="expected a picture"):  # would run Ghostscript
        processor(saved(noise(4, 4), "EPS"))
    with pytest.raises(FileNotFoundError):
        processor(tmp_path / "missing.png")
    with pytest.raises(
        TypeError, match=r"images\[0\]: expected a path, bytes, a PIL image or an array, got int"
    ):
        processor([3])


def test_bad_arrays():
    for shape in ((0, 5, 3), (5, 0, 3), (0, 0)):
        with pytest.raises(ValueError, match="at least 1x1 pixels, got"):
            processor(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="at least 1x1 pixels, got 0x5"):
        processor(Image.new("RGB", (0, 5)))
    for shape in ((5,), (1, 5, 5, 3), (3, 336, 336)):
        with pytest.raises(ValueError, match=r"expected an array \[H, W\] or \[H, W, C\]"):
            processor(np.zeros(shape, np.uint8))
    for dtype in (np.float32, np.int64):
        with pytest.raises(TypeError, match="expected uint8"):
            processor(np.zeros((5, 5, 3), dtype))


def bomb(width, height):
    """A whole PNG's head, and pixels that unpack to little."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("pillow", ["as it is", "without its own limit", "warnings are errors"])
def test_decompression_bomb(monkeypatch, recwarn, pillow):
    """Refused before anything is decoded."""
    if pillow == "without its own limit":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    if pillow == "warnings are errors":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**8)
        monkeypatch.setattr("warnings.warn", lambda message, kind: (_ for _ in ()).throw(kind(message)))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    for size in ((60000, 60000), (14000, 14000)):
        with pytest.raises(ValueError, match=r"expected at most 178,956,970 pixels, got .*scale it down"):
            processor(bomb(*size))
    small = ImageProcessor(max_pixels=99)
    for source in (bomb(10, 10), np.zeros((10, 10, 3), np.uint8)):
        with pytest.raises(ValueError, match="expected at most 99 pixels, got 10x10"):
            small(source)


def test_preprocessor_config(tmp_path):
    """The released fields, the grid also as a string; what is unknown or otherwise is an error."""
    fields = {
        "auto_map": {"AutoImageProcessor": "image_processor.ImageProcessor"},
        "image_processor_type": "ImageProcessor",
        "image_grid_pinpoints": [list(size) for size in GRID],
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "patch_size": 14,
        "process_image_mode": "anyres",
        "size": [336, 336],
    }
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(fields))
    assert ImageProcessor.from_file(tmp_path) == ImageProcessor.from_file(file) == processor
    assert ImageProcessor.from_dict(fields | {"image_grid_pinpoints": str(list(GRID))}) == processor
    assert ImageProcessor.from_dict(fields | {"size": {"height": 336, "width": 336}}) == processor
    other = ImageProcessor.from_dict({"size": 28, "image_grid_pinpoints": [[28, 56]], "patch_size": 7})
    assert other(noise(30, 30)).tiles.shape == (3, 3, 28, 28) and other.tokens(30, 30) == 16 + 5 * 4
    bad = {
        "process_image_mode": "resize", "resample": 0, "size": [336, 224], "crop_size": 224, "patch_size": 13,
        "image_std": [1, 1, 0], "image_grid_pinpoints": [[336, 300]], "brightness": 2,
    }  # fmt: skip
    for name, value in bad.items():
        with pytest.raises(ValueError, match="ImageProcessor: expected .*, got"):
            ImageProcessor.from_dict(fields | {name: value})
    for grid in ("[(336, ", "system()", [336], 5):
        with pytest.raises(ValueError, match="expected image_grid_pinpoints of pairs"):
            ImageProcessor.from_dict(fields | {"image_grid_pinpoints": grid})
    file.write_text("{")
    with pytest.raises(ValueError, match="expected JSON in .*preprocessor_config.json, got"):
        ImageProcessor.from_file(tmp_path)
