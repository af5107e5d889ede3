"""What the tests of the Triton backend share: sequences cut where a test wants it, and raw calls.

To be imported only where Triton is.
"""

from collections.abc import Callable

from support import Inputs, Result, device_of

from lightning_attn import backends
from lightning_attn.backends.triton import config
from lightning_attn.backends.triton.config import Arch, Segments, Tiles

ARCHS = {name: config.ARCHS[name] for name in ("sm_80", "sm_90", "sm_100", "gfx942")}

Cut = Callable[[int, int, int, int, Tiles, Arch], Segments]


def in_segments(count: int) -> Cut:
    """In place of `config.segments`: so many, of whole blocks, or as many as there are blocks."""

    def segments(
        programs: int, tokens: int, documents: int, state_tokens: int, tiles: Tiles, arch: Arch
    ) -> Segments:
        blocks = max(1, -(-tokens // tiles.block))
        length = -(-blocks // count) * tiles.block
        return Segments(max(1, -(-tokens // length)), length)

    return segments


def of_length(length: int) -> Cut:
    """In place of `config.segments`: segments of any length."""

    def segments(
        programs: int, tokens: int, documents: int, state_tokens: int, tiles: Tiles, arch: Arch
    ) -> Segments:
        return Segments(max(1, -(-tokens // length)), length)

    return segments


def run_raw(x: Inputs) -> Result:
    """Outputs and gradients of the raw functions, which look at no value."""
    kernels = backends.load("triton")
    y = x.to(device_of("triton"))
    shared = y.q, y.k, y.v, y.decay, y.scale, y.initial_state, y.cu_seqlens
    o, state = kernels.attention_forward(*shared, True)
    gradients = kernels.attention_backward(y.do, y.dstate, *shared)
    names = ("o", "state", "dq", "dk", "dv", "dinitial_state")
    results = zip(names, (o, state, *gradients), strict=True)
    return {name: t.cpu() for name, t in results if t is not None}
