"""What memory the kernels write, read and take."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import (
    DTYPES,
    HALF,
    HERE,
    ON_CPU,
    Inputs,
    Result,
    affordable,
    assert_same_bits,
    check,
    check_norm,
    device_of,
    dtype_id,
    make_inputs,
    make_norm_inputs,
    poisoned_memory,
    run,
    run_norm,
)

from lightning_attn import lightning_attention_decode

TESTS = Path(__file__).parent
# On CPU tensors, as the buffers between guard pages are; on a GPU there are canaries (test_gpu_memory.py).
KERNELS = [backend for backend in HERE if backend != "reference"]
SHAPES = {
    "odd": {"B": 8, "T": 70, "H": 2, "K": 7, "V": 9},
    "wide": {"B": 1, "T": 65, "H": 2, "K": 100, "V": 129},
    "segments": {"B": 1, "T": 700, "H": 1, "K": 40, "V": 33},
    "packed": {"lengths": (3, 0, 64, 1, 40), "H": 2, "K": 16, "V": 24},
}


def script(name: str, *arguments: str) -> str:
    """What tests/<name> prints, run in an interpreter of its own: it may crash."""
    process = subprocess.run(
        [sys.executable, str(TESTS / name), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, (
        f"ended with {process.returncode}\n{process.stdout[-500:]}\n{process.stderr[-2000:]}"
    )
    return process.stdout


def decode(x: Inputs, backend: str, slots: torch.Tensor | None = None) -> Result:
    state = x.initial_state.clone().to(device_of(backend))
    q, k, v, decay = (t.to(device_of(backend)) for t in (x.q, x.k, x.v, x.decay))
    o = lightning_attention_decode(q, k, v, decay, state, slots=slots, scale=x.scale, backend=backend)
    return {"o": o.cpu(), "state": state.cpu()}


# ---- row 6: everything is written -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_output_or_gradient_is_left_unwritten(variant, shape, dtype):
    """Row 6: what PyTorch hands out uninitialised holds NaN, and none is left."""
    x = make_inputs(**SHAPES[shape], dtype=dtype)
    with poisoned_memory():
        result = run(x, variant)
    check(result, x)


@pytest.mark.op("attention_decode")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_no_output_of_decode_is_left_unwritten_for_padding_neither(variant, dtype):
    """Row 6: the rows of padding are zeros, not what the memory held."""
    x = make_inputs(B=5, T=2, H=3, K=7, V=9, dtype=dtype)
    slots = torch.tensor([3, -1, 0, -1, 4], device=device_of(variant))
    with poisoned_memory():
        result = decode(x, variant, slots)
    assert all(t.isfinite().all() for t in result.values())
    assert not result["o"][[1, 3]].any()
    assert (result["o"][[0, 2, 4]] != 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_no_output_of_gated_rms_norm_is_left_unwritten(variant, dtype):
    """Row 6: y, the saved statistics and the gradients."""
    inputs = make_norm_inputs((30, 19), dtype)
    with poisoned_memory():
        result = run_norm(inputs, 1e-6, variant)
    check_norm(result, inputs, 1e-6)


def with_nan(x: Inputs) -> Inputs:
    nan = {n: torch.full_like(t, torch.nan) for n, t in vars(x).items() if isinstance(t, torch.Tensor)}
    return replace(x, **{**nan, "decay": x.decay, "cu_seqlens": x.cu_seqlens})


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_nothing_of_one_call_is_seen_by_the_next(variant, dtype):
    """Rows 6 and 7: workspaces that a call on NaN left behind change no bit of the calls that follow."""
    x = make_inputs(**SHAPES["odd"], dtype=dtype)
    few = make_inputs(B=2, T=3, H=2, K=7, V=9, dtype=dtype)
    norm = make_norm_inputs((30, 19), dtype)
    before = [run(x, variant), decode(few, variant), run_norm(norm, 1e-6, variant)]
    for shape in (
        {"B": affordable(variant, 2, 1), "T": 130, "H": affordable(variant, 2, 1), "K": 256, "V": 256},
        {"B": 1, "T": affordable(variant, 700, 200), "H": 1, "K": 200, "V": 190},
    ):
        run(with_nan(make_inputs(**shape, dtype=dtype)), variant)
    decode(with_nan(make_inputs(B=4, T=affordable(variant, 20, 3), H=2, K=256, V=256, dtype=dtype)), variant)
    run_norm([torch.full_like(t, torch.nan) for t in make_norm_inputs((70, 600), dtype)], 1e-6, variant)
    after = [run(x, variant), decode(few, variant), run_norm(norm, 1e-6, variant)]
    for a, b in zip(after, before, strict=True):
        for name in a:
            assert_same_bits(a[name], b[name], name)


def test_workspaces_full_of_nan_change_nothing():
    """Row 6: in a process whose heap hands out nothing but NaN, every result obeys the rule."""
    assert "checked" in script("poisoned_heap.py")


# ---- row 7: nothing foreign is read ---------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=dtype_id)
@pytest.mark.parametrize("document", range(4))
def test_nan_in_the_other_documents_changes_no_bit(variant, document, dtype, poison):
    """Row 7: tokens, gradients and states of the other documents of a pack do not matter."""
    lengths = (70, 3, affordable(variant, 600, 130), 65)
    x = make_inputs(lengths=lengths, H=2, K=24, V=17, dtype=dtype)
    start = sum(lengths[:document])
    own = slice(start, start + lengths[document])

    def outside(t: torch.Tensor, index: tuple) -> torch.Tensor:
        y = torch.full_like(t, poison)
        y[index] = t[index]
        return y

    dirty = replace(
        x,
        **{n: outside(getattr(x, n), (slice(None), own)) for n in ("q", "k", "v", "do")},
        **{n: outside(getattr(x, n), (document,)) for n in ("initial_state", "dstate")},
    )
    clean, other = run(x, variant), run(dirty, variant)
    for name in clean:
        index = (document,) if "state" in name else (slice(None), own)
        assert_same_bits(other[name][index], clean[name][index], name)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=dtype_id)
def test_nan_in_the_other_rows_and_heads_changes_no_bit(variant, dtype):
    """Row 7: nor do other rows of the batch, nor other heads."""
    x = make_inputs(B=3, T=70, H=3, K=24, V=17, dtype=dtype)

    def outside(t: torch.Tensor, head_dim: int) -> torch.Tensor:
        y = torch.full_like(t, torch.nan)
        index = (1, *[slice(None)] * (head_dim - 1), 2)
        y[index] = t[index]
        return y

    tokens = {n: outside(getattr(x, n), 2) for n in ("q", "k", "v", "do")}
    states = {n: outside(getattr(x, n), 1) for n in ("initial_state", "dstate")}
    clean, other = run(x, variant), run(replace(x, **tokens, **states), variant)
    for name in clean:
        index = (1, 2) if "state" in name else (1, slice(None), 2)
        assert_same_bits(other[name][index], clean[name][index], name)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=dtype_id)
def test_later_tokens_change_no_bit_of_earlier_outputs(variant, dtype):
    """Row 7: causal to the bit, within a block and across blocks."""
    x = make_inputs(B=1, T=140, H=2, dtype=dtype)
    clean = run(x, variant)["o"]
    for t in (1, 30, 63, 64, 100, 139):
        later = {n: torch.cat([getattr(x, n)[:, :t], -2 * getattr(x, n)[:, t:]], 1) for n in ("q", "k", "v")}
        assert_same_bits(run(replace(x, **later), variant)["o"][:, :t], clean[:, :t])


@pytest.mark.op("attention_decode")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_nan_in_padding_rows_and_unused_slots_changes_no_bit_in_decode(variant, dtype):
    """Rows 7 and 17: rows with slot -1, and states that no slot names, are neither read nor written."""
    x = make_inputs(B=6, T=2, H=2, K=9, V=17, dtype=dtype)
    slots = torch.tensor([5, -1, 2, 0, -1, 3], device=device_of(variant))
    clean = decode(x, variant, slots)
    padding, unused = [1, 4], [1, 4]
    dirty = {n: getattr(x, n).clone() for n in ("q", "k", "v", "initial_state")}
    for name, t in dirty.items():
        t[unused if name == "initial_state" else padding] = torch.nan
    other = decode(replace(x, **dirty), variant, slots)
    assert_same_bits(other["o"], clean["o"])
    for s in range(6):
        assert_same_bits(other["state"][s], (dirty["initial_state"] if s in unused else clean["state"])[s])


# ---- row 8: nothing beyond the buffers is touched -------------------------------------------------------------


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("side", ["after", "before"])
def test_guard_pages_around_every_buffer_stay_untouched(name, side):
    """Row 8: every input and output lies against memory whose touch ends the process; no bit differs."""
    assert "checked" in script("guard_pages.py", name, side)


# ---- memory taken ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [name for name in KERNELS if name in ON_CPU])
@pytest.mark.parametrize("case", ["forward", "backward", "packed forward", "packed backward"])
def test_extra_memory_is_the_outputs_and_a_constant(backend, case):
    """Peak memory is the outputs plus O(threads d d): no state per block of tokens, and none per document."""
    report = json.loads(script("peak_memory.py", backend, *case.split()))
    assert report["saved_states"] > report["allowed"], "the allowance would hide what this looks for"
    assert report["control"] >= report["allowed"], "this does not see memory that is taken"
    assert report["extra"] <= report["allowed"]
