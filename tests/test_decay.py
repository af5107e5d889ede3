"""The decay rates against closed forms written otherwise, numbers worked out by hand, and transformers."""

import math
from fractions import Fraction

import mpmath
import pytest
import torch

from lightning_attn import decay

HEADS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 17, 31, 32, 33, 48, 64, 96, 100, 128]


def rounded(values: list[float]) -> torch.Tensor:
    """float32 [H]: one rounding of float64 values."""
    return torch.tensor(values, dtype=torch.float64).float()


def assert_rounded_once(actual: torch.Tensor, exact: list[mpmath.mpf]) -> None:
    """Equal to the exact values rounded to float32."""
    assert actual.dtype == torch.float32 and actual.shape == (len(exact),)
    torch.testing.assert_close(actual, rounded([float(x) for x in exact]), rtol=0, atol=0)


@pytest.mark.parametrize("H", [h for h in HEADS if h & (h - 1) == 0])
def test_alibi_power_of_two(H: int) -> None:
    """s_h = 2^(-8(h+1)/H)."""
    assert_rounded_once(decay.alibi(H), [mpmath.mpf(2) ** (mpmath.mpf(-8) * (h + 1) / H) for h in range(H)])


@pytest.mark.parametrize("H", [h for h in HEADS if h & (h - 1)])
def test_alibi_other(H: int) -> None:
    """The slopes for P, the power of two below H, then 2^(-8(i+1/2)/P): those that lie halfway before
    them."""
    P = 1 << (H.bit_length() - 1)
    steps = [Fraction(-8 * (h + 1), P) for h in range(P)]
    steps += [Fraction(-8 * (2 * i + 1), 2 * P) for i in range(H - P)]
    assert_rounded_once(
        decay.alibi(H), [mpmath.mpf(2) ** (mpmath.mpf(x.numerator) / x.denominator) for x in steps]
    )


def test_alibi_by_hand() -> None:
    """The paper's own example, 8 heads, and two numbers of heads that are no power of two."""
    assert decay.alibi(8).tolist() == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert decay.alibi(6).tolist() == [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]
    assert decay.alibi(3).tolist() == [1 / 16, 1 / 256, 1 / 4]
    assert decay.alibi(1).tolist() == [1 / 256]


@pytest.mark.parametrize("H", HEADS)
@pytest.mark.parametrize("layer, layers", [(0, 80), (1, 80), (40, 80), (78, 80), (79, 80), (0, 1), (1, 2)])
def test_minimax(H: int, layer: int, layers: int) -> None:
    """ALiBi's slopes times 1 - l/(L-1) + 1e-5. The last layer still decays, a model of one layer is a first
    layer."""
    P = 1 << (H.bit_length() - 1)
    steps = [mpmath.mpf(-8) * (h + 1) / P for h in range(P)]
    steps += [mpmath.mpf(-8) * (2 * i + 1) / (2 * P) for i in range(H - P)]
    factor = 1 - (layer / (layers - 1) if layers > 1 else 0) + 1e-5
    assert_rounded_once(decay.minimax(H, layer, layers), [mpmath.mpf(2) ** x * factor for x in steps])


def test_minimax_text_01() -> None:
    """Numbers of the released model, 64 heads and 80 layers, by hand."""
    first, last = decay.minimax(64, 0, 80), decay.minimax(64, 79, 80)
    assert first[7].item() == pytest.approx(0.5 * 1.00001, rel=1e-7)
    assert first[63].item() == pytest.approx(1.00001 / 256, rel=1e-7)
    assert last[7].item() == pytest.approx(0.5e-5, rel=1e-7)
    assert (last > 0).all()


@pytest.mark.parametrize("H", [1, 3, 8, 64])
def test_retnet(H: int) -> None:
    """A token keeps 1 - 2^(-5-h) of its weight from one to the next, with no cancellation in late heads."""
    with mpmath.workdps(60):
        assert_rounded_once(decay.retnet(H), [-mpmath.log(1 - mpmath.mpf(2) ** (-5 - h)) for h in range(H)])
    assert decay.retnet(H)[0].item() == pytest.approx(math.log(32 / 31), rel=1e-7)
    assert (decay.retnet(H) > 0).all()


@pytest.mark.parametrize("H, layer, layers", [(1, 0, 1), (4, 0, 12), (6, 5, 12), (32, 23, 24)])
def test_fla(H: int, layer: int, layers: int) -> None:
    """(8/H) (1 - l/L) h: linear in the head, so the first never decays."""
    exact = [Fraction(8, H) * (1 - Fraction(layer, layers)) * h for h in range(H)]
    actual = decay.fla(H, layer, layers)
    assert actual.dtype == torch.float32 and actual.shape == (H,) and actual[0] == 0
    assert actual.tolist() == pytest.approx([float(x) for x in exact], rel=1e-7)


ALL = [
    lambda **options: decay.alibi(12, **options),
    lambda **options: decay.minimax(12, 3, 4, **options),
    lambda **options: decay.retnet(12, **options),
    lambda **options: decay.fla(12, 3, 4, **options),
]


@pytest.mark.parametrize("rates", ALL, ids=["alibi", "minimax", "retnet", "fla"])
def test_what_a_rate_is(rates) -> None:
    """Finite, >= 0, a constant, on the device that was asked for, float32 whatever the default dtype is."""
    s = rates()
    assert s.isfinite().all() and (s >= 0).all() and not s.requires_grad and s.device.type == "cpu"
    assert rates(device="meta").shape == (12,) and rates(device="meta").device.type == "meta"
    with torch.device("meta"):
        assert rates().device.type == "meta" and rates(device="cpu").tolist() == s.tolist()
    for dtype in (torch.float64, torch.bfloat16):
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            assert rates().dtype == torch.float32 and rates().tolist() == s.tolist()
        finally:
            torch.set_default_dtype(default)


@pytest.mark.parametrize("function", [decay.alibi, decay.retnet])
@pytest.mark.parametrize("bad", [0, -1])
def test_bad_number_of_heads(function, bad: int) -> None:
    with pytest.raises(ValueError, match=f"expected num_heads >= 1, got {bad}"):
        function(bad)


@pytest.mark.parametrize("function", [decay.alibi, decay.retnet])
@pytest.mark.parametrize("bad", [2.0, "2", None, True, torch.tensor(2)], ids=repr)
def test_bad_type_of_heads(function, bad: object) -> None:
    with pytest.raises(TypeError, match="expected num_heads to be an int, got"):
        function(bad)


@pytest.mark.parametrize("function", [decay.minimax, decay.fla])
def test_bad_layer(function) -> None:
    for layer, layers in ((-1, 4), (4, 4), (0, 0), (0, -1)):
        with pytest.raises(ValueError, match=f"layer_idx < num_layers = {layers}, got layer_idx = {layer}"):
            function(8, layer, layers)
    for heads in (0, -3):
        with pytest.raises(ValueError, match=f"expected num_heads >= 1, got {heads}"):
            function(heads, 0, 1)
    with pytest.raises(TypeError, match="expected layer_idx to be an int, got 1.0"):
        function(8, 1.0, 4)
    with pytest.raises(TypeError, match="expected num_layers to be an int, got True"):
        function(8, 0, True)
    with pytest.raises(TypeError, match="expected num_heads to be an int, got 8.0"):
        function(8.0, 0, 4)


@pytest.mark.parametrize("H", [1, 2, 4, 8, 64])
@pytest.mark.parametrize("layer", [0, 1, 40, 79])
def test_against_transformers(H: int, layer: int) -> None:
    """transformers' slopes for a power of two, which divide the layer by L - 1 + 1e-5: the same at the first
    layer."""
    modeling = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    config = modeling.MiniMaxConfig(
        hidden_size=H,
        num_attention_heads=H,
        head_dim=1,
        num_hidden_layers=80,
        layer_types=["linear_attention"] * 80,
        block_size=2,
    )
    theirs = modeling.MiniMaxLightningAttention(config, layer).slope_rate.flatten()
    ours = decay.minimax(H, layer, 80)
    of_layers = (1 - layer / (79 + 1e-5) + 1e-5) / (1 - layer / 79 + 1e-5)
    eps = torch.finfo(torch.float32).eps  # theirs is a float32 base to the power of h + 1
    torch.testing.assert_close(theirs, (ours.double() * of_layers).float(), rtol=(H + 3) * eps, atol=0)
    if layer == 0:
        assert of_layers == 1
