"""What only the Triton kernels have: segments, tiles for architectures, folded grids, offsets that nobody checked.

All else is in the tests of every backend.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    BACKENDS,
    INTERPRETED,
    Inputs,
    Result,
    assert_same_bits,
    check,
    check_norm,
    device_of,
    dtype_id,
    dtypes_of,
    make_inputs,
    make_norm_inputs,
    poisoned_memory,
    run,
    run_norm,
    truth,
)

from lightning_attn import lightning_attention, lightning_attention_decode
from lightning_attn.backends import reference

pytest.importorskip("triton", reason="Triton is not installed")
if "triton" not in BACKENDS:
    pytest.skip("there is neither a GPU nor Triton's interpreter", allow_module_level=True)

from triton_support import ARCHS, Cut, in_segments, of_length, run_raw

from lightning_attn.backends import triton
from lightning_attn.backends.triton import attention, config, launch
from lightning_attn.backends.triton.scan import scan_kernel

pytestmark = pytest.mark.gpu

DTYPES = dtypes_of("triton")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="a device runs the tiles of its own architecture only"
)


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch):
    """Calls that are made after it cut their sequences as it says."""

    def use(how: Cut) -> None:
        monkeypatch.setattr(config, "segments", how)

    return use


# ---- segments -------------------------------------------------------------------------------------------------

# In blocks of 64, as the interpreter has them, 5 segments are 5 blocks of most of these.
SHAPES = {
    "one sequence": {"B": 1, "T": 300, "H": 2},
    "a batch": {"B": 3, "T": 129, "H": 1},
    "no state": {"B": 1, "T": 200, "H": 1, "state": False},
    "wide": {"B": 1, "T": 200, "H": 1, "K": 100, "V": 70},
    "slow and fast": {"B": 1, "T": 300, "H": 3, "K": 7, "V": 5, "rates": (0.0, 1e-3, 40.0)},
    "documents that end on borders": {"lengths": (64, 0, 64, 128, 64, 0), "H": 1},
    "documents across borders": {"lengths": (5, 0, 150, 1, 63, 0, 101), "H": 1},
    "more documents than segments": {"lengths": (3, 0, 9, 61, 0, 0, 1, 55, 20, 64, 2, 40), "H": 1},
    "one document among empty ones": {"lengths": (0, 0, 300, 0), "H": 1},
}


@dtypes
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_number_of_segments_obeys_the_rule(cut, shape, count, dtype):
    """Rows 1, 6 and 11: states that cross segments and documents; nothing is left unwritten; twice the same bits."""
    cut(in_segments(count))
    x = make_inputs(**SHAPES[shape], dtype=dtype)
    with poisoned_memory():
        result = run(x, "triton")
    check(result, x)
    if count > 1:
        for name, y in run(x, "triton").items():
            assert_same_bits(y, result[name], name)


documents = st.lists(st.one_of(st.just(0), st.integers(1, 5), st.integers(1, 25)), max_size=4)


@settings(max_examples=15)
@given(
    dtype=st.sampled_from(DTYPES),
    before=documents,
    after=documents,
    length=st.integers(4, 40),
    state=st.booleans(),
)
def test_any_packing_in_segments_of_any_length_obeys_the_rule(cut, dtype, before, after, length, state):
    """Rows 1 and 11: borders of documents and of segments in any order, on each other too."""
    lengths = (*before, 30, *after)  # one of 30 tokens: enough numbers for errors to compare
    cut(of_length(max(length, sum(lengths) // 5)))
    x = make_inputs(lengths=lengths, H=1, K=16, V=16, dtype=dtype, state=state, rates=(0.05,))
    check(run(x, "triton"), x)


@settings(max_examples=15)
@given(dtype=st.sampled_from(DTYPES), tokens=st.integers(30, 130), length=st.integers(4, 70))
def test_a_sequence_in_segments_of_any_length_obeys_the_rule(cut, dtype, tokens, length):
    """Row 1: T and the length of a segment know nothing of each other."""
    cut(of_length(max(length, tokens // 5)))
    x = make_inputs(B=1, T=tokens, H=1, K=16, V=16, dtype=dtype, rates=(0.05,))
    check(run(x, "triton"), x)


@dtypes
@pytest.mark.parametrize("document", range(4))
def test_nan_in_other_documents_of_the_same_segments_changes_no_bit(cut, document, dtype):
    """Row 7: of tokens, gradients and states; documents end within segments, and go on through several."""
    lengths = (40, 3, 80, 20)
    cut(of_length(30))
    x = make_inputs(lengths=lengths, H=1, dtype=dtype)
    start = sum(lengths[:document])
    own = slice(start, start + lengths[document])

    def outside(t: torch.Tensor, index: tuple) -> torch.Tensor:
        y = torch.full_like(t, torch.nan)
        y[index] = t[index]
        return y

    dirty = replace(
        x,
        **{n: outside(getattr(x, n), (slice(None), own)) for n in ("q", "k", "v", "do")},
        **{n: outside(getattr(x, n), (document,)) for n in ("initial_state", "dstate")},
    )
    clean, other = run(x, "triton"), run(dirty, "triton")
    for name in clean:
        index = (document,) if "state" in name else (slice(None), own)
        assert_same_bits(other[name][index], clean[name][index], name)


tiles = st.sampled_from([config.Tiles(block, 64, 64, 4, 2) for block in (16, 32, 64)])
archs = st.sampled_from([*ARCHS.values(), config.INTERPRETER])


@given(
    programs=st.one_of(st.just(0), st.integers(1, 600), st.integers(1, 1 << 20)),
    tokens=st.one_of(st.integers(0, 200), st.integers(0, 1 << 21), st.integers(1 << 30, 1 << 36)),
    documents=st.one_of(st.just(0), st.integers(1, 5000)),
    state_tokens=st.integers(1, 400),
    tiles=tiles,
    arch=archs,
)
def test_segments_are_whole_blocks_that_cover_every_token_once(
    programs, tokens, documents, state_tokens, tiles, arch
):
    """No segment is empty but the one of no tokens, none too long to be counted in 32 bits, and no more of them than
    a few rounds of programs."""
    cut = config.segments(programs, tokens, documents, state_tokens, tiles, arch)
    assert cut.count >= 1 and cut.length >= 1 and cut.length % tiles.block == 0
    assert (cut.count - 1) * cut.length < max(tokens, 1) <= cut.count * cut.length
    assert cut.length < 2**31
    if tokens < 2**30:
        assert programs * cut.count <= 5 * max(arch.processors, programs)


def test_a_sequence_is_cut_where_programs_are_few_and_only_there():
    """One pass if that fills the machine; else enough segments to fill it."""
    arch = ARCHS["sm_90"]
    tiles = config.chunk(128, 128, torch.bfloat16, arch)

    def count(programs: int, tokens: int, documents: int = 1) -> int:
        return config.segments(programs, tokens, documents, 128, tiles, arch).count

    assert count(arch.processors, 1 << 17) == 1
    assert count(1000 * arch.processors, 1 << 17) == 1
    assert count(8, 0) == count(0, 1 << 17, 0) == count(8, 1) == count(8, tiles.block) == 1
    assert 4 * 8 <= 8 * count(8, 1 << 17) <= 2 * arch.processors
    assert 64 <= count(1, 1 << 20) <= 4 * arch.processors


# ---- tiles ----------------------------------------------------------------------------------------------------


@interpreted
@dtypes
@pytest.mark.parametrize(("K", "V"), [(7, 20), (33, 80), (128, 128), (256, 256)])
@pytest.mark.parametrize("arch", ARCHS)
def test_the_tiles_of_every_architecture_obey_the_rule(monkeypatch, arch, K, V, dtype):
    """Rows 1 and 22: blocks, columns and segments as they are there."""
    monkeypatch.setattr(triton, "device_arch", lambda device: ARCHS[arch])
    T = 20 if K * V > 2**12 else 70  # blocks of 16 there, of at most 64 here
    x = make_inputs(B=1, T=T, H=1, K=K, V=V, dtype=dtype, scale=K**-0.5, rates=(0.02,))
    check(run(x, "triton"), x)


@interpreted
@dtypes
@pytest.mark.parametrize(("arch", "rows", "D"), [("sm_90", 35, 300), ("gfx942", 260, 2048)])
def test_the_norm_of_every_architecture_obeys_the_rule(monkeypatch, arch, rows, D, dtype):
    """Rows 1 and 22: the gradient of the weight is a sum over the programs of a whole machine."""
    monkeypatch.setattr(triton, "device_arch", lambda device: ARCHS[arch])
    inputs = make_norm_inputs((rows, D), dtype)
    check_norm(run_norm(inputs, 1e-6, "triton"), inputs, 1e-6)


@pytest.mark.parametrize(("dtype", "D"), [(torch.float16, 8193), (torch.float32, 16384)], ids=dtype_id)
def test_the_norm_of_long_rows_obeys_the_rule(dtype, D):
    """Rows 1 and 12: up to the longest row that is taken; several rows a program, one after the other."""
    inputs = make_norm_inputs((5, D), dtype)
    check_norm(run_norm(inputs, 1e-6, "triton"), inputs, 1e-6)


# ---- grids ----------------------------------------------------------------------------------------------------


def decode(x: Inputs, slots: torch.Tensor | None = None) -> Result:
    y = x.to(device_of("triton"))
    state = y.initial_state.clone()
    o = triton.attention_decode(y.q, y.k, y.v, y.decay, state, slots, y.scale)
    return {"o": o.cpu(), "state": state.cpu()}


@pytest.mark.parametrize("limit", [2, 3])
def test_a_folded_grid_gives_the_same_bits(cut, monkeypatch, limit):
    """Row 15: more programs than a dimension of a grid may have are laid out in two, and run in another order."""
    cut(in_segments(4))
    packed = make_inputs(lengths=(64, 0, 64, 70), H=1)  # documents that end on borders
    few = make_inputs(B=5, T=2, H=3)
    norm = make_norm_inputs((9, 2048), torch.float32)
    results = []
    for allowed in (launch.GRID_LIMIT, limit):
        monkeypatch.setattr(launch, "GRID_LIMIT", allowed)
        results.append(run(packed, "triton") | run_norm(norm, 1e-6, "triton"))
        results[-1] |= {f"decoded {name}": y for name, y in decode(few).items()}
    for name, y in results[1].items():
        assert_same_bits(y, results[0][name], name)


@given(st.one_of(st.integers(1, 300), st.integers(1, 2**32)))
def test_a_grid_holds_every_program_and_little_else(programs):
    """Row 15: in both dimensions within the limit, as long as there are fewer than its square."""
    along, folds = launch.grid(programs)
    assert along <= launch.GRID_LIMIT and along * (folds - 1) < programs <= along * folds
    assert folds == 1 if programs <= launch.GRID_LIMIT else folds <= programs // launch.GRID_LIMIT + 1


# ---- what nobody has checked ----------------------------------------------------------------------------------


@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=dtype_id)
@pytest.mark.parametrize("slots", [(-1, -5, 6, 2**31 - 1, -(2**31)), (6, 7, 8, 9, 10)], ids=str)
def test_a_slot_that_is_none_is_padding(slots, integers):
    """Rows 7 and 17: on a GPU slots are not looked at; any that is not a row of the cache touches none."""
    x = make_inputs(B=5, T=2, H=2)
    x = replace(x, initial_state=torch.cat([x.initial_state, x.initial_state[:1]]))  # 6 rows
    with poisoned_memory():
        result = decode(x, torch.tensor(slots, dtype=integers, device=device_of("triton")))
    assert not result["o"].any()
    assert_same_bits(result["state"], x.initial_state)


def test_packed_tokens_beyond_2_to_the_31_elements(cut):
    """Row 14: one short document after 2^27 tokens that belong to none, so that all but a few pages stay untouched."""
    tokens, D = (1 << 27) + 5, 16
    x = make_inputs(B=1, T=4, H=1, K=D, V=D, dtype=torch.float16).to(device_of("triton"))
    storage = torch.empty((4, tokens, D), dtype=torch.float16, device=x.q.device)
    far = []
    for page, y in zip(storage, (x.q, x.k, x.v, x.do), strict=True):
        page[-4:] = y[0, :, 0]
        far.append(page[None, :, None])
    q, k, v, do = far
    expected = run_raw(x)
    offsets = torch.tensor([tokens - 4, tokens], device=x.q.device)
    for length in (tokens, tokens - 2):  # a segment, and two that part the document
        cut(of_length(length))
        shared = q, k, v, x.decay, x.scale, x.initial_state, offsets
        o, state = triton.attention_forward(*shared, True)
        dq, dk, dv, dinitial = triton.attention_backward(do, x.dstate, *shared)
        actual = {name: y[:, -4:].cpu() for name, y in {"o": o, "dq": dq, "dk": dk, "dv": dv}.items()}
        actual |= {"state": state.cpu(), "dinitial_state": dinitial.cpu()}
        del o, dq, dk, dv  # 4 GiB each
        if length == tokens:
            for name, y in actual.items():
                assert_same_bits(y, expected[name], name)
        check(actual, x.to("cpu"))


# ---- slow decays ----------------------------------------------------------------------------------------------

# float32 rounds lambda, lambda^64 and lambda^1024 of the rates here off by about half of what it can be off by, and in
# one direction each time: that adds up, while what it rounds a sum off by does not.


def relative_error(state: torch.Tensor, truth: torch.Tensor) -> float:
    return ((state.double().cpu() - truth).abs().max() / truth.abs().max()).item()


def test_a_slow_decay_keeps_its_rate_over_many_blocks():
    """Row 16: rounded lambdas would be off by 6e-6 after 313 blocks."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 20_000, 1, 16) for _ in range(3))
    rate = torch.tensor([9.36e-8])
    _, truth = reference.block_form(q.double(), k.double(), v.double(), rate)
    on_device = [x.to(device_of("triton")) for x in (q, k, v, rate)]
    _, state = lightning_attention(*on_device, return_state=True, backend="triton")
    assert relative_error(state, truth) < 2e-6


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "backward"])
def test_a_slow_decay_keeps_its_rate_over_many_segments(reverse):
    """Row 16: rounded lambdas would be off by 2e-5 after 1000 segments. The scan alone, from what segments leave."""
    count, size, device = 1000, 24, device_of("triton")
    cut = config.Segments(count, 64)
    rate = torch.tensor([9.36e-8])
    left = torch.randn(count, size, generator=torch.Generator().manual_seed(0))
    truth = torch.zeros(size, dtype=torch.float64)
    for E in left.double()[1:]:
        truth = truth * torch.exp(-rate.double() * cut.length) + E
    entering = (left.flip(0) if reverse else left).to(device)
    call = attention.Call(rate.to(device), 1.0, None, (1, count * cut.length, 1), config.INTERPRETER)
    arguments = call.arguments(cut, programs=2)
    del arguments["scale"]
    scan_kernel[(2,)](entering=entering, **arguments, SIZE=size, BLOCK=16, REVERSE=reverse)
    assert relative_error(entering[0 if reverse else -1], truth) < 2e-6


def test_a_slow_decay_keeps_its_rate_over_many_decoded_tokens():
    """Row 16: rounded lambdas would be off by 3e-5 after 1000 tokens."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1000, 1, 16) for _ in range(3))
    rate = torch.tensor([3e-8])
    _, truth = reference.block_form(q.double(), k.double(), v.double(), rate)
    on_device = [x.to(device_of("triton")) for x in (q, k, v, rate)]
    state = torch.zeros(1, 1, 16, 16, device=on_device[0].device)
    lightning_attention_decode(*on_device, state, backend="triton")
    assert relative_error(state, truth) < 2e-6


@pytest.mark.parametrize("rate", [8.0, 12.0, 15.0])
def test_what_a_fast_decay_leaves_of_a_gradient_does_not_underflow(rate):
    """Row 16: in float16 lambda and the scale would be too small for the operand of a product."""
    x = make_inputs(B=2, T=66, H=1, dtype=torch.float16, rates=(rate,), scale=0.25)
    x = replace(x, dstate=torch.zeros_like(x.dstate))
    actual, exact = run(x, "triton")["dinitial_state"], truth(x)["dinitial_state"]
    assert ((actual - exact).abs().max() / exact.abs().max()).item() < 1e-3
