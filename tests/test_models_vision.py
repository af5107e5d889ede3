"""MiniMax-VL-01's vision tower against transformers' CLIP, the packing and merging of pictures against plain loops, and the
errors for pictures that do not fit their placeholders.
"""

import re

import pytest
import torch
from torch import nn

from models import vision
from models.config import TextConfig, VisionConfig, VLConfig
from models.image import ImageProcessor, ProcessedImage
from models.vision import VisionTower
from models.vl import VLForConditionalGeneration

IMAGE = 50
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
SIDE, PATCH = 56, 14  # 4 x 4 patches a tile
GRID = ((56, 56), (56, 112), (112, 56), (112, 112), (168, 56), (56, 224))
VL = VLConfig(
    text=TextConfig(
        vocab_size=60, hidden_size=24, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, rotary_dim=4, num_local_experts=2, attn_type_list=(0, 1),
    ),
    vision=VisionConfig(**TINY, image_size=SIDE, patch_size=PATCH),
    image_token_id=IMAGE,
    image_grid_pinpoints=GRID,
)  # fmt: skip
SIZES = [(56, 56), (1, 1), (100, 60), (60, 100), (167, 40), (30, 200), (300, 7), (7, 500), (112, 111)]
processor = ImageProcessor(size=SIDE, patch_size=PATCH, image_grid_pinpoints=GRID)


def shaken(module):
    """Every parameter counts: norms and biases are no longer ones and zeros."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return module


@pytest.fixture(scope="module")
def model():
    return shaken(VLForConditionalGeneration(VL)).eval()


def picture(width, height):
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(width))
    return processor(pixels.to(torch.uint8))


def ids_for(images, *, before=2, after=3):
    """[1, T]: some text around each picture."""
    text = iter(range(10**6))
    ids = []
    for image in images:
        ids += [next(text) % 40 for _ in range(before)] + [IMAGE] * processor.tokens(*image.size)
        ids += [next(text) % 40 for _ in range(after)]
    return torch.tensor([ids])


def relative(x, y):
    return ((x - y).norm() / y.norm()).item()


def test_tower_equals_transformers():
    """The hidden states after the last layer, less the class token; the same weights by the same names."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(**TINY, image_size=SIDE, patch_size=PATCH, hidden_act="gelu")
    clip = shaken(CLIPVisionModel(config)).eval()
    tower = VisionTower(VL.vision)
    theirs = {
        "vision_model." + name.removeprefix("vision_model."): tensor
        for name, tensor in clip.state_dict().items()
        if "post_layernorm" not in name and "position_ids" not in name
    }
    tower.load_state_dict(theirs, strict=True)
    tiles = torch.randn(5, 3, SIDE, SIDE)
    with torch.no_grad():
        features = tower(tiles)
        expected = clip(tiles, output_hidden_states=True).hidden_states[-1][:, 1:]
    assert features.shape == (5, 16, 32) and relative(features, expected) < 1e-5


def test_tower_takes_tiles_in_batches(monkeypatch):
    tower = shaken(VisionTower(VL.vision))
    tiles, sizes = torch.randn(7, 3, SIDE, SIDE), []
    whole = tower(tiles)
    monkeypatch.setattr(vision, "TILES_AT_ONCE", 3)
    tower.vision_model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    assert relative(tower(tiles), whole) < 1e-6 and sizes == [3, 3, 1]
    assert tower(tiles[:0]).shape == (0, 16, 32)
    assert tower.bfloat16()(tiles).dtype == torch.bfloat16
    for shape in ((3, SIDE, SIDE), (1, 3, SIDE, 28), (1, 4, SIDE, SIDE)):
        with pytest.raises(ValueError, match=r"expected tiles \[N, 3, 56, 56\], got"):
            tower(torch.zeros(shape))


def test_the_released_model():
    """Sizes and names: 303,505,408 parameters in the tower, 8,637 tensors in all, no post_layernorm."""
    model = VLForConditionalGeneration(VLConfig(), device="meta", dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.vision_tower.parameters()) == 303_505_408
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    eyes = {name: shape for name, shape in shapes.items() if not name.startswith("language_model.")}
    assert len(eyes) == 394 and not any("post_layernorm" in name for name in eyes)
    for name, shape in {
        "image_newline": (6144,),
        "multi_modal_projector.linear_1.weight": (6144, 1024),
        "multi_modal_projector.linear_2.bias": (6144,),
        "vision_tower.vision_model.embeddings.class_embedding": (1024,),
        "vision_tower.vision_model.embeddings.patch_embedding.weight": (1024, 3, 14, 14),
        "vision_tower.vision_model.embeddings.position_embedding.weight": (577, 1024),
        "vision_tower.vision_model.pre_layrnorm.bias": (1024,),
        "vision_tower.vision_model.encoder.layers.23.self_attn.out_proj.weight": (1024, 1024),
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias": (4096,),
        "vision_tower.vision_model.encoder.layers.0.layer_norm2.weight": (1024,),
    }.items():
        assert eyes[name] == shape
    stacked = {"gate_up_proj": 64, "down_proj": 32}  # w1 and w3, w2 of 32 experts
    text = sum(stacked.get(name.rsplit(".", 1)[1], 1) for name in shapes.keys() - eyes.keys())
    assert text == 8243 and text + len(eyes) == 8637


def packed(model, image):
    """The picture's tokens patch by patch: where in the resized picture each one lies says whether it stays."""

    def project(x):
        first, second = model.multi_modal_projector.linear_1, model.multi_modal_projector.linear_2
        x = x @ first.weight.T + first.bias
        x = x * (1 + torch.erf(x / 2**0.5)) / 2
        return x @ second.weight.T + second.bias

    features = [project(model.vision_tower(tile[None])[0]) for tile in image.tiles]
    (width, height), n = image.size, SIDE // PATCH
    W, H = max(
        GRID,
        key=lambda g: (
            kept := min(
                int(width * min(g[0] / width, g[1] / height))
                * int(height * min(g[0] / width, g[1] / height)),
                width * height,
            ),
            kept - g[0] * g[1],
        ),
    )
    columns, rows = W // PATCH, H // PATCH
    left = top = 0
    if width / height > columns / rows:
        top = (rows - (height * columns) // width) // 2
    else:
        left = (columns - (width * rows) // height) // 2
    tokens = list(features[0])
    for y in range(top, rows - top):
        for x in range(left, columns - left):
            tile = 1 + (y // n) * (W // SIDE) + x // n
            tokens.append(features[tile][y % n * n + x % n])
        tokens.append(model.image_newline)
    return torch.stack(tokens)


@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
def test_packing(model, size):
    image = picture(*size)
    with torch.no_grad():
        (tokens,), expected = model.features([image]), packed(model, image)
    assert tokens.shape == (processor.tokens(*size), 24)
    assert relative(tokens, expected) < 1e-5


def test_packing_at_the_released_sizes():
    """Tiles of 24 x 24 patches, with a tower that says which tile and patch each one is."""
    config = VLConfig(text=VL.text, vision=VisionConfig(**TINY), image_token_id=IMAGE)
    model = VLForConditionalGeneration(config)
    model.multi_modal_projector = nn.Identity()
    for size, count in {(640, 480): 2340, (1920, 1080): 9864, (1008, 2016): 11088, (336, 336): 1176}.items():
        image = ImageProcessor()(torch.zeros(size[1], size[0], 3, dtype=torch.uint8))
        n = len(image.tiles)
        tile, patch = torch.meshgrid(torch.arange(n), torch.arange(576), indexing="ij")
        marks = torch.stack([tile, patch // 24, patch % 24], dim=-1).float()  # [n, 576, 3]
        model.vision_tower.forward = lambda tiles, marks=marks: marks
        model.image_newline = nn.Parameter(torch.full((3,), -1.0))
        (tokens,) = model.features([image])
        assert len(tokens) == count and torch.equal(tokens[:576], marks[0])
        W = {640: 2, 1920: 6, 1008: 3, 336: 1}[size[0]]  # tiles in a row
        W = 5 if n == 16 else W
        rows = tokens[576:].split(int((tokens[576:, 0] == -1).nonzero()[0]) + 1)
        for row in rows:
            assert (row[-1] == -1).all() and (row[:-1] >= 0).all()
        at = torch.stack([row[:-1] for row in rows]).long()  # [rows, columns, 3]
        y = (at[..., 0] - 1) // W * 24 + at[..., 1]
        x = (at[..., 0] - 1) % W * 24 + at[..., 2]
        assert (y == y[:1, :1] + torch.arange(len(y))[:, None]).all()
        assert (x == x[:1, :1] + torch.arange(x.shape[1])).all()


def test_merging(model):
    """Text keeps its embeddings, each placeholder takes its picture's next token, over several rows."""
    images = [picture(*size) for size in SIZES[2:6]]
    first, second = ids_for(images[:1]), ids_for(images[1:])
    ids = torch.zeros(2, second.shape[1], dtype=torch.long)
    ids[0, -first.shape[1] :], ids[1] = first[0], second[0]
    with torch.no_grad():
        embeds = model.embed(ids, images)
        tokens = iter(torch.cat([packed(model, image) for image in images]))
        plain = [
            [next(tokens) if i == IMAGE else model.language_model.model.embed_tokens.weight[i] for i in row]
            for row in ids
        ]
    expected = torch.stack([torch.stack(row) for row in plain])
    assert embeds.shape == (*ids.shape, 24) and relative(embeds, expected) < 1e-5
    assert torch.equal(embeds[ids != IMAGE], expected[ids != IMAGE])
    assert next(tokens, None) is None


def test_pictures_together_are_each_alone(model):
    images = [picture(*size) for size in SIZES]
    with torch.no_grad():
        for image, together in zip(images, model.features(images), strict=True):
            assert relative(together, model.features([image])[0]) < 1e-6


def test_adjacent_pictures(model):
    """Nothing between them: one run of placeholders."""
    images = [picture(*size) for size in SIZES[:3]]
    with torch.no_grad():
        embeds = model.embed(ids_for(images, before=0, after=0), images)
    assert relative(embeds[0], torch.cat(model.features(images))) < 1e-6


def test_forward(model):
    """Logits of the merged embeddings; text alone, one token after a cache, and gradients to every part."""
    image = picture(100, 60)
    ids = ids_for([image])
    embeds = model.embed(ids, image)
    logits = model(ids, images=[image])
    assert logits.shape == (1, ids.shape[1], 60)
    assert torch.equal(logits, model(inputs_embeds=embeds))
    assert torch.equal(logits, model.language_model(inputs_embeds=embeds))
    text = torch.arange(8)[None]
    assert torch.equal(model(text), model.language_model(text))
    assert torch.equal(model(text, images=[]), model.language_model(text))

    cache = model.new_cache(1)
    steps = [model(ids[:, :-1], images=[image], cache=cache), model(ids[:, -1:], cache=cache)]
    torch.testing.assert_close(torch.cat(steps, dim=1), logits.detach(), rtol=1e-4, atol=1e-4)
    assert torch.isfinite(model(torch.tensor([[IMAGE]]), cache=cache)).all()  # a model may sample it

    logits.square().sum().backward()
    for name in (
        "image_newline",
        "multi_modal_projector.linear_1.weight",
        "language_model.model.embed_tokens.weight",
    ):
        assert model.get_parameter(name).grad.abs().sum() > 0
    assert model.vision_tower.vision_model.embeddings.class_embedding.grad.abs().sum() > 0
    model.zero_grad()


def test_pictures_that_do_not_fit_their_placeholders(model):
    first, second = picture(100, 60), picture(30, 200)
    a, b = (processor.tokens(*image.size) for image in (first, second))
    ids = ids_for([first, second])
    expected = re.escape(f"{a} for images[0] (100x60), {b} for images[1] (30x200), got ")
    less = torch.cat([ids[:, :2], ids[:, 3:]], dim=1)  # one placeholder less
    moved = torch.cat(
        [ids[:, :2], ids[:, 3:-3], ids[:, 2:3], ids[:, -3:]], dim=1
    )  # and one more of the second
    for wrong, got in ((less, f"{a - 1}, {b}"), (moved, f"{a - 1}, {b + 1}"), (ids[:, : a + 4], f"{a}")):
        with pytest.raises(
            ValueError, match=f"^input_ids: expected image tokens .id 50. in runs of {expected}{got}$"
        ):
            model.embed(wrong, [first, second])
    with pytest.raises(ValueError, match=f"{expected}{b}, {a}$"):
        model.embed(ids_for([second, first]), [first, second])
    with pytest.raises(ValueError, match=f"in runs of {a} for images.0. .100x60., got none"):
        model(torch.arange(5)[None], images=first)
    with pytest.raises(ValueError, match=f"in runs of none, without images, got {a}, {b}"):
        model(ids)
    with pytest.raises(ValueError, match=r"images\[0\]: expected 5 tiles for 100x60, got 4"):
        model.embed(ids_for([first]), [ProcessedImage(first.tiles[:4], first.size)])
    with pytest.raises(TypeError, match=r"images\[1\]: expected what ImageProcessor gives, got Tensor"):
        model.embed(ids, [first, second.tiles])
    with pytest.raises(ValueError, match="expected none beside inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 3, 24), images=[first])
    with pytest.raises(ValueError, match=r"expected input_ids in \[0, 60\), got 60"):
        model.embed(torch.tensor([[60]]))
