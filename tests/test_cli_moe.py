"""The cases of the mixture of experts: that right versions pass and wrong ones fail, what they cost, their inputs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cli_support import BF16, F32, bench_module, measured, moe_peers_module
from torch import Tensor
from torch.nn import functional as F

from lightning_attn.cli import moe_eager, moe_inputs, moe_weighted
from lightning_attn.cli.accuracy import Judge
from lightning_attn.cli.case import Case
from lightning_attn.cli.eager import Function
from lightning_attn.cli.moe_blocks import MoeBlock, MoeMlp
from lightning_attn.cli.moe_cases import GroupedGemm, Route
from lightning_attn.cli.peers import missing_peers, peers

CPU, F64 = torch.device("cpu"), torch.float64
PASSES = ("forward", "forward+backward", "backward", "graph")
KINDS: dict[str, Case] = {
    "route": Route(F32, T=65, E=16, k=2),
    "route-all": Route(F32, T=65, E=16, k=2, renormalize=False),
    "ties": Route(F32, T=65, E=16, k=3, ties=True),
    "gemm": GroupedGemm(F32, M=65, E=8, N=24, K=16, spread="skewed", passes=PASSES),
    "mlp": MoeMlp(F32, T=65, D=32, F=24, E=8, k=2, layout="interleaved", passes=PASSES),
    "idle": MoeMlp(F32, T=65, D=32, F=24, E=8, k=2, spread="idle"),
    "int8": MoeMlp(F32, T=9, D=32, F=24, E=8, k=2, int8=True, passes=("forward", "graph")),
    "block": MoeBlock(F32, T=65, D=32, F=24, E=8, k=2, passes=PASSES),
    "int8-block": MoeBlock(F32, T=9, D=32, F=24, E=8, k=2, int8=True),
}


@pytest.fixture(params=[False, True], ids=["all", "sample"])
def sampled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether only some experts are checked, as they are of matrices that are large."""
    if request.param:
        monkeypatch.setattr(moe_weighted, "LARGE", 0)
    return request.param


def at(case: Case, dtype: torch.dtype) -> Case:
    """In another dtype; of large blocks the forward alone can be checked."""
    if isinstance(case, MoeBlock) and moe_weighted.LARGE == 0:
        return replace(case, dtype=dtype, passes=("forward",))
    return replace(case, dtype=dtype)


def bad(case: Case, function: Function, pass_: str | None = None) -> set[str]:
    """The outputs that fail."""
    inputs = case.inputs(CPU)
    return {v.output for v in Judge(case, inputs, case.fullest_pass).verdicts(function, pass_) if not v.ok}


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_passes(kind: str, dtype: torch.dtype, sampled: bool, small: None) -> None:
    """At every pass, in float64 too, where the truth is another text than the plain version."""
    case = at(KINDS[kind], dtype)
    inputs = case.inputs(CPU)
    judge = Judge(case, inputs, case.fullest_pass)
    for pass_ in case.passes:
        verdicts = judge.verdicts(case.ours("reference"), pass_)
        assert all(v.ok for v in verdicts), [str(v) for v in verdicts]
        assert len(verdicts) == len({v.output for v in verdicts}) > 0


def wrong_mlp(how: str) -> Function:
    """The plain version with one mistake."""

    def mlp(x: Tensor, gate_up: Any, down: Any, weights: Tensor, experts: Tensor, *, layout: str) -> Tensor:
        if how == "weights swapped":
            weights = weights.flip(1)
        elif how == "last expert skipped":
            experts = experts.masked_fill(experts == experts.max(), -1)
        elif how == "layout":
            layout = {"interleaved": "concatenated", "concatenated": "interleaved"}[layout]
        elif how == "scales forgotten" and isinstance(down, tuple):
            down = (down[0], torch.ones_like(down[1]))
        elif how == "no gate":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(F, "silu", torch.ones_like)
                return moe_eager.moe_mlp(x, gate_up, down, weights, experts, layout=layout)
        return moe_eager.moe_mlp(x, gate_up, down, weights, experts, layout=layout)

    return mlp


@pytest.mark.parametrize(
    "how", ["weights swapped", "last expert skipped", "layout", "no gate", "scales forgotten"]
)
@pytest.mark.parametrize("kind", ["mlp", "int8", "block"])
def test_wrong_experts_fail(kind: str, how: str, sampled: bool) -> None:
    case = at(KINDS[kind], BF16)
    assert isinstance(case, MoeMlp)
    if how == "scales forgotten" and not case.int8:
        return
    wrong = wrong_mlp(how)
    if isinstance(case, MoeBlock):
        inner = wrong

        def wrong(*args: Any, **kwargs: Any) -> Tensor:
            return moe_eager.moe(*args, top_k=2, moe_mlp=inner, **kwargs)

    assert "y" in bad(case, wrong)
    assert not bad(case, case.plain)


@pytest.mark.parametrize("name", ["x", "gate_up", "down", "weights"])
def test_a_wrong_gradient_fails(name: str, sampled: bool) -> None:
    """And nothing else does."""
    case = at(KINDS["mlp"], F32)
    place = ("x", "gate_up", "down", "weights", "experts").index(name)

    def wrong(*args: Tensor, **options: Any) -> Tensor:
        given = list(args)
        given[place] = 1.1 * given[place] - 0.1 * given[place].detach()
        return moe_eager.moe_mlp(*given, **options)  # type: ignore[arg-type]

    assert bad(case, wrong) == {"d" + name}


GEMM_WRONG: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "not transposed in its groups": lambda x, w, offs: moe_eager.grouped_gemm(x, w.roll(1, 0), offs),
    "offsets": lambda x, w, offs: moe_eager.grouped_gemm(x, w, (offs + 1).clamp(max=len(x))),
    "last group": lambda x, w, offs: moe_eager.grouped_gemm(x, w, offs).index_fill(
        0, torch.arange(int(offs[-2]), len(x)), 0.0
    ),
}


@pytest.mark.parametrize("how", GEMM_WRONG)
def test_a_wrong_product_fails(how: str, sampled: bool) -> None:
    assert "y" in bad(at(KINDS["gemm"], BF16), GEMM_WRONG[how])


def test_wrong_routing_fails() -> None:
    """One expert in one place, the order of equal ones, a softmax over others."""
    case = KINDS["route"]

    def one_wrong(logits: Tensor, k: int, **options: Any) -> tuple[Tensor, Tensor]:
        weights, experts = moe_eager.route(logits, k, **options)
        experts[-1, -1] = (experts[-1, -1] + 1) % logits.shape[1]
        return weights, experts

    assert bad(case, one_wrong) == {"experts"}
    assert bad(case, lambda *args, renormalize: moe_eager.route(*args, renormalize=False)) == {
        "weights",
        "dlogits",
    }

    def last_first(logits: Tensor, k: int, **options: Any) -> tuple[Tensor, Tensor]:
        weights, experts = moe_eager.route_stable(logits.flip(1), k, **options)
        return weights, logits.shape[1] - 1 - experts

    assert not bad(case, last_first)
    assert "experts" in bad(KINDS["ties"], last_first)


# ---- inputs and costs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, F32, BF16, torch.float16])
@pytest.mark.parametrize("E, k, D", [(16, 2, 64), (32, 2, 256), (8, 8, 8)])
def test_rounding_cannot_flip_an_expert(E: int, k: int, D: int, dtype: torch.dtype) -> None:
    """In every dtype the gate chooses those that it is to choose, with more between them and the others than any rounding."""
    case = MoeBlock(dtype, T=500, D=D, F=8, E=E, k=k)
    inputs = case.inputs(CPU)
    logits = inputs["x"].double() @ inputs["gate"].double().mT
    rounded = (inputs["x"] @ inputs["gate"].mT).double()
    largest = logits.sort(dim=-1, descending=True)
    chosen = case.chosen.long().sort(-1).values
    for found in (logits, rounded):
        assert torch.equal(found.topk(k).indices.sort(-1).values, chosen)
    if k < E:
        margin = (largest.values[:, k - 1] - largest.values[:, k]).min().item()
        assert margin > 1 > 10 * (logits - rounded).abs().max().item()


def test_spreads() -> None:
    """As they are called; the same at every call, and all different for a token."""
    T, E = 300, 8
    counts = {s: moe_inputs.experts(s, T, E, 2).flatten().bincount(minlength=E) for s in moe_inputs.SPREADS}
    for spread in moe_inputs.SPREADS:
        chosen = moe_inputs.experts(spread, T, E, 2)
        assert bool((chosen[:, 0] != chosen[:, 1]).all()) and counts[spread].sum() == 2 * T
        sizes = moe_inputs.group_sizes(spread, T, E)
        assert sum(sizes) == T and min(sizes) >= 0
    assert counts["balanced"].min() > 0.7 * 2 * T / E
    assert counts["skewed"][0] > 3 * counts["skewed"][-1]
    assert counts["one"][E // 2] == T and bool((counts["idle"][1::2] == 0).all())
    with pytest.raises(ValueError, match="idle"):
        moe_inputs.experts("idle", 5, 4, 3)


def test_what_the_experts_cost() -> None:
    """Products once, matrices of experts that have tokens once, gradients of all."""
    expert = 3 * 32 * 24
    case = MoeMlp(BF16, T=1, D=32, F=24, E=8, k=2)
    assert case.flops("forward") == 2 * 2 * expert and case.flops("forward+backward") == 3 * case.flops(
        "forward"
    )
    assert case.bytes("forward") == 2 * expert * 2 + 2 * 32 * 2 + 2 * 8
    assert case.bytes("backward") == (2 + 8) * expert * 2 + 3 * 32 * 2 + 2 * 12
    many = replace(case, T=100)
    assert many.used == 8 and many.bytes("graph") == 8 * expert * 2 + 100 * (2 * 32 * 2 + 2 * 8)
    int8 = MoeMlp(BF16, T=1, D=32, F=24, E=8, k=2, int8=True)
    assert int8.bytes("forward") == 2 * (expert + 4 * (48 + 32)) + 2 * 32 * 2 + 2 * 8
    block = MoeBlock(BF16, T=100, D=32, F=24, E=8, k=2)
    assert block.flops("forward") == many.flops("forward") + 2 * 100 * 32 * 8
    gemm = GroupedGemm(BF16, M=100, E=8, N=24, K=32, spread="one")
    assert gemm.flops("forward") == 2 * 100 * 24 * 32
    assert gemm.bytes("forward") == 2 * (24 * 32 + 100 * (24 + 32)) + 4 * 8


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="int8"):
        MoeMlp(F32, T=1, D=8, F=8, E=2, k=1, int8=True, passes=("forward+backward",))
    with pytest.raises(ValueError, match="layout"):
        MoeBlock(F32, T=1, D=8, F=8, E=2, k=1, layout="interleaved")
    with pytest.raises(ValueError, match="cannot be checked"):
        MoeBlock(F32, T=1, D=6144, F=9216, E=32, k=2, passes=("forward+backward",))


def test_matrices_are_met_cold(small: None) -> None:
    """A forward pass goes round copies of the matrices, a graph makes a call with each; nothing else is copied."""
    case = MoeMlp(F32, T=4, D=32, F=16, E=8, k=2, passes=("forward", "graph"))
    copies = -(-(2**16) // (case.used * 3 * 32 * 16 * 4))
    assert case.calls_per_step("graph") == copies > 1 and case.calls_per_step("forward") == 1
    seen: list[tuple[int, ...]] = []

    def spy(*args: Tensor, **_: Any) -> Tensor:
        seen.append(tuple(t.data_ptr() for t in args))
        return args[0]

    step = case.step(spy, case.inputs(CPU), "forward")
    for _ in range(2 * copies):
        step()
    assert len({gate_up for _, gate_up, *_ in seen}) == copies == len(set(seen))
    assert len({x for x, *_ in seen}) == 1


def test_cases_without_room_are_left_out() -> None:
    """And said to be, with what they need; nothing smaller takes their place."""
    target = MoeBlock(BF16, T=4, D=6144, F=9216, E=32, k=2)
    tiny = KINDS["block"]
    kept, notes = bench_module.fitting([tiny, target], 24 * 10**9)
    assert kept == [tiny] and len(notes) == 1 and "is left out: it needs about" in notes[0]
    assert bench_module.fitting([tiny, target], 140 * 10**9) == ([tiny, target], [])
    assert bench_module.fitting([tiny, target], None) == ([tiny, target], [])


# ---- peers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16])
@pytest.mark.parametrize("kind", ["route", "gemm", "mlp", "idle", "int8", "block"])
def test_peers_agree_with_the_truth(kind: str, dtype: torch.dtype) -> None:
    case = at(KINDS[kind], dtype)
    inputs = case.inputs(CPU)
    judge = Judge(case, inputs, case.fullest_pass)
    for name, peer in peers(case, CPU).items():
        verdicts = judge.verdicts(peer.function)
        assert all(v.ok for v in verdicts), (name, [str(v) for v in verdicts])


def test_which_peers_there_are() -> None:
    """grouped_mm where it takes dtype and alignment; transformers beside the whole block alone."""
    pytest.importorskip("transformers")
    assert set(peers(KINDS["block"], CPU)) == {
        "per-expert",
        "grouped_mm",
        "transformers",
        "transformers-eager",
    }
    assert set(peers(KINDS["mlp"], CPU)) == set(peers(KINDS["gemm"], CPU)) == {"per-expert", "grouped_mm"}
    assert set(peers(KINDS["int8"], CPU)) == {"per-expert"}
    assert set(peers(KINDS["route"], CPU)) == {"softmax-topk"}
    for other in (replace(KINDS["gemm"], dtype=F64), replace(KINDS["gemm"], K=9)):  # type: ignore[call-arg]
        assert set(peers(other, CPU)) == {"per-expert"}


def test_transformers_has_its_default_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a model made from its config: each of the two peers runs its own implementation."""
    modeling = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    default = moe_peers_module._default_experts(modeling)
    case, called = KINDS["block"], []
    right = ALL_EXPERTS_FUNCTIONS[default]

    def spy(*args: Any) -> Tensor:
        called.append(default)
        return right(*args)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, default, spy)
    found = peers(case, CPU)
    for name, expected in (("transformers", [default]), ("transformers-eager", [])):
        called.clear()
        case.evaluate(found[name].function, case.inputs(CPU), "forward")
        assert called == expected, name


def test_liger(monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    """With a stand-in of its signature; one that is wrong is said and not timed, one that is not there is said."""
    monkeypatch.setattr(moe_peers_module, "_liger", lambda: liger)
    monkeypatch.setattr("lightning_attn.cli.peers.GPU_PEERS", ("cpu",))

    def liger(
        x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        assert top_k_index.dtype == torch.int32
        return moe_eager.moe_mlp(
            x, gate_up_proj, down_proj, wrong * top_k_weights, top_k_index, layout="concatenated"
        )

    for wrong in (1.0, 1.1):
        for case in (
            replace(KINDS["block"], passes=("forward",)),
            replace(KINDS["idle"], passes=("forward",)),
        ):
            rows, said = measured(case, backend="reference", compare=True)
            row = next(row for row in rows if row["provider"] == "liger")
            assert row["ok"] == (wrong == 1.0) and all(r["ok"] for r in rows if r is not row)
            assert ("liger is not timed" in said) == (wrong != 1.0)
    assert "liger" not in peers(KINDS["mlp"], CPU)  # it knows one layout
    why = "Liger-Kernel is not installed: it is not compared"
    monkeypatch.setattr(moe_peers_module, "_liger", lambda: why)
    assert why in missing_peers(CPU) and "liger" not in peers(KINDS["idle"], CPU)
