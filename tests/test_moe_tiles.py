"""Rows 15, 22, 24: every way of the Triton products of groups, with the tiles of every architecture, by pointer and by descriptor,
in grids that are folded: all give the same results to the rule. In Triton's interpreter, or on the GPU that is there.
"""

from dataclasses import replace

import pytest
import torch
from moe_support import check_gemm, check_mlp, make_experts, make_groups, run_gemm, run_mlp
from support import BACKENDS, INTERPRETED, assert_same_bits

if "triton" not in BACKENDS:
    pytest.skip("Triton is not here", allow_module_level=True)

from lightning_attn.backends.triton import launch, moe_config
from lightning_attn.backends.triton.config import ARCHS

pytestmark = pytest.mark.gpu

KINDS = ("wgmma", "mma", "mfma", "host")
TABLES = {"large": moe_config._LARGE, "small": moe_config._SMALL, "few": moe_config._FEW}
CASES = [(way, kind) for way in TABLES for kind in KINDS] + [(way, "float32") for way in TABLES]
HERE = ("host",) if "triton" in INTERPRETED else ()


@pytest.fixture
def every_product(monkeypatch):
    """A function that makes all products go one way, with the tiles of one kind of architecture."""
    product = moe_config.product

    def use(way, kind, descriptors=False):
        table = TABLES[way]

        def chosen(rows, groups, dtype, weight, accumulators, arch):
            usual = product(rows, groups, dtype, weight, accumulators, arch)
            tiles = replace(table[kind], value=table[kind].value // accumulators)
            return replace(usual, way=way, tiles=tiles, descriptors=descriptors)

        monkeypatch.setattr(moe_config, "product", chosen)

    return use


@pytest.mark.parametrize("way, kind", CASES)
def test_tiles_of_every_architecture_agree(every_product, way, kind):
    """Row 22: forward and gradients, tails and idle experts among them."""
    dtype = torch.float32 if kind in ("float32", "host") else torch.float16
    every_product(way, kind)
    T = 9 if way == "few" and HERE else 90
    a = make_experts(T=T, D=48, F=40, E=4, only=(0, 1, 3), dtype=dtype)
    check_mlp(run_mlp(a, "triton"), a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("counts", [(15, 16, 0, 17), (64, 65), (1, 128, 130, 2)], ids=str)
def test_descriptors_give_the_same_bits(every_product, monkeypatch, counts, dtype):
    """What comes by descriptor is what comes by pointer; sizes that leave parts of tiles."""
    kind = "host" if dtype == torch.float32 else "wgmma"
    a = make_groups(counts, N=40, K=88, dtype=dtype, rest=3)
    results = []
    for descriptors in (False, True):
        every_product("large", kind, descriptors)
        results.append(run_gemm(a, "triton"))
        monkeypatch.undo()
    check_gemm(results[1], a)
    for name, y in results[0].items():
        assert_same_bits(results[1][name], y, name)


def test_what_no_descriptor_can_be_of_comes_by_pointer(every_product):
    """Rows that do not begin at multiples of 16 bytes, and no rows at all."""
    for sizes in ({"N": 33, "K": 41}, {"N": 1, "K": 1}):
        every_product("large", "host", descriptors=True)
        a = make_groups((20, 0, 65), **sizes)
        check_gemm(run_gemm(a, "triton"), a)
    a = make_experts(T=0)
    assert run_mlp(a, "triton")["y"].shape == (0, 48)


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_grids_are_folded(monkeypatch, limit):
    """Row 15: with few programs to a dimension of a grid, every launch of the MLP gives the same bits."""
    a = make_experts(T=60, D=32, F=24, E=4)
    expected = run_mlp(a, "triton")
    monkeypatch.setattr(launch, "GRID_LIMIT", limit)
    for name, y in run_mlp(a, "triton").items():
        assert_same_bits(y, expected[name], name)


def test_few_programs_take_all_tiles(monkeypatch):
    """Persistent programs: one, or three, of them give the bits of as many as there are tiles."""
    a = make_groups((70, 0, 140, 5), N=300, K=32, rest=4)
    expected = run_gemm(a, "triton")
    product = moe_config.product
    for programs in (1, 3):
        monkeypatch.setattr(moe_config, "product", lambda *a, n=programs: replace(product(*a), programs=n))
        for name, y in run_gemm(a, "triton").items():
            assert_same_bits(y, expected[name], name)


@pytest.mark.parametrize("together", [1, 2, 3])
def test_the_order_of_tiles_does_not_matter(every_product, monkeypatch, together):
    """Bands of few tiles of rows, the last of a group not full: the bits of tiles in any other order."""
    every_product("small", "float32" if not HERE else "host")
    monkeypatch.setattr(
        moe_config, "_WEIGHT_GRADIENT", {"host": replace(moe_config._SMALL["host"], block=16, value=16)}
    )
    a = make_groups((40, 0, 330, 5), N=150, K=32, rest=4)
    expected = run_gemm(a, "triton")
    monkeypatch.setattr(moe_config, "TOGETHER", together)
    for name, y in run_gemm(a, "triton").items():
        assert_same_bits(y, expected[name], name)
    check_gemm(expected, a)


def test_offsets_that_lie_lead_nowhere():
    """Where nothing is checked: offsets that fall, are negative or past the end read and write nothing outside."""
    from lightning_attn.backends import load

    triton, device = load("triton"), "cpu" if HERE else "cuda"
    x, w = torch.ones(40, 16, device=device), torch.ones(4, 24, 16, device=device)
    dy = torch.ones(40, 24, device=device)
    for ends in ([50, 10, 60, 2**31 - 1], [-5, -1, 20, 3], [30, 20, 10, 0], [-(2**31)] * 4):
        offs = torch.tensor(ends, dtype=torch.int32, device=device)
        y = triton.grouped_gemm_forward(x, w, offs)
        assert ((y == 0) | (y == 16)).all()
        triton.grouped_gemm_backward(dy, x, w, offs, True, True)


@pytest.mark.parametrize("arch", ARCHS.values(), ids=lambda arch: arch.name)
def test_the_choice_of_a_way(arch):
    """A decode step, a small batch and a prefill of MiniMax-Text-01 go the three ways; tiles come by descriptor where there
    is the hardware.
    """

    def way(T, dtype=torch.bfloat16):
        return moe_config.product(2 * T, 32, dtype, dtype, 1, arch)

    assert [way(T).way for T in (1, 8, 9, 128, 768, 8192)] == [
        "few",
        "few",
        "small",
        "small",
        "small",
        "large",
    ]
    assert way(8192).programs == arch.processors
    has = arch.name in ("sm_90", "sm_100")
    assert (
        way(8192).descriptors == has and not way(128).descriptors and not way(8192, torch.float32).descriptors
    )
