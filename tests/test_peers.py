"""The peers of `bench --compare` that are made for GPUs, on the CPU: flash-linear-attention with a stand-in for it,
and softmax attention. One that is wrong, or raises, is not timed and stops nobody."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cli_support import BF16, F32, SMALL, measured, moe_peers_module, off, peers_module, softmax_module
from torch import Tensor

from lightning_attn.backends.reference import recurrence
from lightning_attn.cli import results
from lightning_attn.cli.case import Case
from lightning_attn.cli.cases import Attention, Decode
from lightning_attn.cli.machine import Limits
from lightning_attn.cli.peers import missing_peers, peers
from lightning_attn.cli.results import Row, Timing

CPU, GPU = torch.device("cpu"), torch.device("cuda")
DENSE = Attention(F32, B=2, T=70, H=3, K=16, V=16, passes=("forward", "forward+backward", "backward"))
STATEFUL = Attention(F32, T=70, H=2, K=16, V=24, lengths=(5, 0, 65), stateful=True)
SLOPES = Attention(F32, T=70, H=3, K=16, V=16, slopes="fla", stateful=True)
STEP = Decode(F32, B=3, H=2, K=16, V=16, T=2, passes=("forward", "graph"))

# ---- flash-linear-attention -------------------------------------------------------------------------------


def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The signature and conventions of fla 0.6.0: g_gamma is the logarithm of the decay, [H]; scale 1/sqrt(K) unless
    given; no argument is written to."""
    assert g is None and g_gamma is not None and bool((g_gamma <= 0).all())
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    start = None if initial_state is None else initial_state.double()
    wide = (x.double() for x in (q, k, v, -g_gamma))
    o, state = recurrence(*wide, scale=scale, initial_state=start, cu_seqlens=cu_seqlens)
    return o.to(v.dtype), state.float() if output_final_state else None


def lightning_attn(
    q: Tensor, k: Tensor, v: Tensor, layer_idx: int, num_layers: int, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """fla's own slopes."""
    heads = q.shape[2]
    rates = 8 / heads * (1 - layer_idx / num_layers) * torch.arange(heads, dtype=torch.float)
    return simple_gla(q, k, v, g_gamma=-rates, **options)


@pytest.fixture
def fla(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """A stand-in for the package, whose operators run on the CPU."""
    names = ("fla", "fla.ops", "fla.ops.simple_gla", "fla.ops.lightning_attn")
    modules: dict[str, Any] = {name: ModuleType(name) for name in names}
    modules["fla.ops.simple_gla"].chunk_simple_gla = simple_gla
    modules["fla.ops.simple_gla"].fused_recurrent_simple_gla = simple_gla
    modules["fla.ops.lightning_attn"].chunk_lightning_attn = lightning_attn
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(peers_module, "GPU_PEERS", ("cpu", "cuda"))
    peers_module._fla.cache_clear()
    yield modules
    peers_module._fla.cache_clear()


def providers(rows: list[dict[str, Any]], ok: bool = True) -> set[str]:
    return {row["provider"] for row in rows if row["ok"] == ok}


@pytest.mark.parametrize("case", [DENSE, STATEFUL, SLOPES, STEP], ids=["dense", "packed", "slopes", "decode"])
def test_fla(case: Case, fla: dict[str, ModuleType], small: None) -> None:
    """It is fed our decay, scale, states and documents, at every pass; with its own slopes also its own function."""
    rows, said = measured(case, compare=True)
    expected = {"lightning_attn", "eager-256", "fla"} | ({"fla-lightning"} if case is SLOPES else set())
    assert providers(rows) == expected and not providers(rows, ok=False), said
    for name in expected:
        assert [row["pass"] for row in rows if row["provider"] == name] == list(case.passes)
    assert {row["backend"] for row in rows if row["provider"] == "fla"} == {"torch"}


WRONG: dict[str, Callable[..., Any]] = {
    "scale": lambda *args, scale, **kwargs: simple_gla(*args, scale=1.1 * scale, **kwargs),
    "decay": lambda *args, g_gamma, **kwargs: simple_gla(*args, g_gamma=1.1 * g_gamma, **kwargs),
    "output": lambda *args, **kwargs: (off(simple_gla(*args, **kwargs)[0]), simple_gla(*args, **kwargs)[1]),
    "state": lambda *args, **kwargs: (simple_gla(*args, **kwargs)[0], kwargs["initial_state"].clone()),
    "start": lambda *args, initial_state, **kwargs: simple_gla(*args, **kwargs),
    "raises": lambda *args, **kwargs: torch.empty(2**60),
}


@pytest.mark.parametrize("how", WRONG)
@pytest.mark.parametrize("case", [STATEFUL, STEP], ids=["packed", "decode"])
def test_fla_that_is_wrong(how: str, case: Case, fla: dict[str, Any], small: None) -> None:
    """It is said and not timed, which stops nobody."""
    for op in ("chunk_simple_gla", "fused_recurrent_simple_gla"):
        setattr(fla["fla.ops.simple_gla"], op, WRONG[how])
    rows, said = measured(case, compare=True)
    assert providers(rows) == {"lightning_attn", "eager-256"} and providers(rows, ok=False) == {"fla"}
    assert all(row["median_ms"] is None for row in rows if not row["ok"])
    assert f"fla is not timed at {case.op} float32" in said
    if how == "raises":
        assert all(row["raised"] for row in rows if row["provider"] == "fla")


def test_fla_that_is_wrong_in_its_slopes(fla: dict[str, Any], small: None) -> None:
    """Only the function with slopes of its own is."""
    fla["fla.ops.lightning_attn"].chunk_lightning_attn = lambda *args, layer_idx, **kwargs: lightning_attn(
        *args, layer_idx=layer_idx + 9, **kwargs
    )
    rows, _ = measured(SLOPES, compare=True)
    assert providers(rows, ok=False) == {"fla-lightning"} and "fla" in providers(rows)


def test_fla_that_is_of_another_version(fla: dict[str, Any], small: None) -> None:
    """It has not the functions: ours is timed all the same."""
    del fla["fla.ops.simple_gla"].chunk_simple_gla
    rows, said = measured(DENSE, compare=True)
    assert "lightning_attn" in providers(rows) and not providers(rows, ok=False)
    assert "is not compared: AttributeError" in said and "chunk_simple_gla" in said


def test_fla_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not installed, or broken: the reason, once, and on a GPU only, where it would run."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if "site-packages" not in p)])
    for name in [name for name in sys.modules if name.partition(".")[0] == "fla"]:
        monkeypatch.delitem(sys.modules, name)
    peers_module._fla.cache_clear()
    assert "flash-linear-attention is not installed: it is not compared" in missing_peers(GPU)
    assert not any("flash" in reason for reason in missing_peers(CPU))
    peers_module._fla.cache_clear()
    (tmp_path / "fla").mkdir()
    (tmp_path / "fla" / "__init__.py").write_text("raise RuntimeError('no driver')")
    assert "flash-linear-attention is not compared: RuntimeError: no driver" in missing_peers(GPU)
    assert "fla" not in peers(DENSE, GPU)
    peers_module._fla.cache_clear()


def test_where_peers_of_gpus_run(fla: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU; slots, which fla does not know, are left out."""
    assert "fla" not in peers(Decode(F32, B=3, H=2, K=16, V=16, slots=True), CPU)
    monkeypatch.setattr(peers_module, "GPU_PEERS", ("cuda",))
    half = Attention(BF16, T=70, H=2, K=64, V=64)
    assert set(peers(half, GPU)) == {"eager-256", "fla", "sdpa"}
    assert set(peers(half, CPU)) == {"eager-256"}
    for other in (
        DENSE,
        Attention(BF16, T=70, H=2, K=16, V=24),
        Attention(BF16, T=9, H=2, K=16, V=16, stateful=True),
    ):
        assert "sdpa" not in peers(other, GPU)


# ---- softmax attention ------------------------------------------------------------------------------------


@pytest.fixture
def softmax(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """sdpa here too, judged on the last 16 tokens."""
    monkeypatch.setattr(peers_module, "GPU_PEERS", ("cpu",))
    monkeypatch.setattr(peers_module, "SDPA_DTYPES", (F32, BF16))
    monkeypatch.setattr(softmax_module, "JUDGED", 16)


@pytest.mark.parametrize("T", [9, 70])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_sdpa(T: int, dtype: torch.dtype, softmax: None) -> None:
    """At every pass of ours, judged by softmax attention, and compared with ours."""
    case = Attention(dtype, B=2, T=T, H=5, K=32, V=32, passes=DENSE.passes)
    rows, said = measured(case, compare=True)
    assert [row["pass"] for row in rows if row["provider"] == "sdpa" and row["ok"]] == list(case.passes)
    assert not providers(rows, ok=False)
    same = ("op", "pass", "dtype", "shape", "bytes", "flops", "limit_ms")
    ours, theirs = (
        [[row[k] for k in same] for row in rows if row["provider"] == name]
        for name in ("lightning_attn", "sdpa")
    )
    assert ours == theirs
    assert len([line for line in said.partition("against")[2].splitlines() if " sdpa " in line]) == 3


def _doubled(x: Tensor) -> Tensor:
    """The same, with twice the gradient."""
    return 2 * x - x.detach()


SOFTMAX_WRONG: dict[str, tuple[Callable[..., Tensor], set[str]]] = {
    "full": (
        lambda q, k, v, decay, *, scale: (
            torch.softmax(scale * q.transpose(1, 2) @ k.transpose(1, 2).mT, -1)
            .matmul(v.transpose(1, 2))
            .transpose(1, 2)
        ),
        {"forward", "forward+backward", "backward"},
    ),
    "scale": (
        lambda q, k, v, decay, *, scale: softmax_module.sdpa(q, k, v, decay, scale=1.1 * scale),
        {"forward", "forward+backward", "backward"},
    ),
    "last token": (
        lambda *args, **kwargs: off(softmax_module.sdpa(*args, **kwargs)),
        {"forward", "forward+backward", "backward"},
    ),
    "dq": (
        lambda q, *args, **kwargs: softmax_module.sdpa(_doubled(q), *args, **kwargs),
        {"forward+backward", "backward"},
    ),
    "dk": (
        lambda q, k, *args, **kwargs: softmax_module.sdpa(q, _doubled(k), *args, **kwargs),
        {"forward+backward", "backward"},
    ),
    "dv": (
        lambda q, k, v, *args, **kwargs: softmax_module.sdpa(q, k, _doubled(v), *args, **kwargs),
        {"forward+backward", "backward"},
    ),
}


@pytest.mark.parametrize("how", SOFTMAX_WRONG)
def test_sdpa_that_is_wrong(how: str, softmax: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not timed at the passes that are."""
    function, failing = SOFTMAX_WRONG[how]
    monkeypatch.setattr(peers_module, "sdpa", function)
    rows, said = measured(DENSE, compare=True)
    assert {row["pass"] for row in rows if not row["ok"]} == failing
    assert providers(rows, ok=False) == {"sdpa"} and "sdpa is not timed at attention" in said


def test_sdpa_without_a_truth(softmax: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """If its truth does not fit in memory it is not timed; ours is."""

    def too_large(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(softmax_module, "last_rows", too_large)
    rows, _ = measured(DENSE, compare=True)
    assert providers(rows, ok=False) == {"sdpa"} and "lightning_attn" in providers(rows)
    assert {row["raised"] for row in rows if not row["ok"]} == {"OutOfMemoryError: no room"}


# ---- how they are shown -----------------------------------------------------------------------------------


def test_plot_of_every_provider(tmp_path: Path) -> None:
    """Each has a colour of its own; so has one that nobody knows."""
    pytest.importorskip("matplotlib")
    from lightning_attn.cli.plot import COLOURS, save_plots

    known = {
        getattr(peers_module, name)
        for name in ("OURS", "EAGER", "TRANSFORMERS", "FLA", "FLA_LIGHTNING", "SDPA")
    } | {
        getattr(moe_peers_module, name)
        for name in ("PER_EXPERT", "SOFTMAX_TOPK", "GROUPED_MM", "TRANSFORMERS_EAGER", "LIGER")
    }
    assert set(COLOURS) == known and len(set(COLOURS.values())) == len(known)
    limits = Limits({F32: 1e12}, 1e11)
    rows = [
        Row.of(Timing(SMALL[0], "forward", name, "torch", "cuda", 1.0, 0.0, True), limits)
        for name in (*known, "another")
    ]
    assert [path.name for path in save_plots(rows, tmp_path)] == ["attention.png"]
    again = [Row.from_json(row.as_json() | {"note": "of somebody else"}) for row in rows]
    assert again == rows and next(results.times(rows)).row_count == len(rows)
    assert rows[0].rate.endswith("GB/s")
