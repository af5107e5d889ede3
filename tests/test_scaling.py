"""`python -m benchmarks.scaling`: its sums against the plans of single ranks, its figures at known points, its files."""

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from benchmarks.scaling import ring
from benchmarks.scaling.__main__ import NOTE, Sizes, main, size
from benchmarks.scaling.layer import Layer
from benchmarks.scaling.operations import OPERATIONS, rows
from benchmarks.scaling.rates import Model, Rates
from lightning_attn.distributed import ring_plan

GIB = 2**30


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def by_name(layer: Layer, pass_: str = "forward") -> dict[str, Any]:
    return {row.operation: row for row in rows(layer) if row.pass_ == pass_}


@pytest.mark.parametrize("method", ["ring", "all_gather"])
@pytest.mark.parametrize("zigzag", [False, True], ids=["contiguous", "zigzag"])
def test_ring_is_the_plan(zigzag: bool, method: str) -> None:
    """Rank by rank what `ring_plan.Plan` says: bytes, steps, pairs; for any cuts and documents."""
    choose = random.Random(0)
    for _ in range(150):
        R, node = choose.randint(1, 9), choose.randint(1, 5)
        pieces = R * (2 if zigzag else 1)
        T = choose.randint(pieces, 60)
        cuts = [0, *sorted(choose.sample(range(1, T), pieces - 1)), T]
        offsets = (0, *sorted(choose.randint(0, T) for _ in range(choose.choice((0, 1, 2, 5, 10)))), T)
        layout = ring_plan.zigzag(cuts) if zigzag else ring_plan.contiguous(cuts)
        plan = ring_plan.plan(layout, layout, offsets)
        found = ring.rows(cuts, offsets, zigzag=zigzag, method=method, node=node)
        bytes_ = zip(*(x.tolist() for x in found.bytes(6, 2, 4)), strict=True)
        wanted = [plan.received(r, method, width=6, itemsize=2, grad_itemsize=4) for r in range(R)]
        assert list(bytes_) == wanted, (cuts, offsets)
        if method == "ring":
            assert found.messages == plan.steps
            senders = {r: (r - 1) % R for r in range(R)}
            near = [n * (senders[r] // node == r // node) for r, n in enumerate(found.received.tolist())]
        else:
            needs = [[ring_plan.length(plan.needs[j][r]) for j in range(R)] for r in range(R)]
            near = [
                sum(n for j, n in enumerate(row) if j != r and j // node == r // node)
                for r, row in enumerate(needs)
            ]
        assert found.near.tolist() == near
        assert found.sent.sum() == found.received.sum()
        assert found.gradients_sent.sum() == found.gradients.sum()
        assert (found.gradients_near <= found.gradients).all()
        layouts = [sum(_pairs(piece, offsets) for piece in layout[r]) for r in range(R)]
        assert ring.pairs(cuts, offsets, zigzag=zigzag).tolist() == layouts


def _pairs(piece: tuple[int, int], offsets: tuple[int, ...]) -> int:
    return sum(t - s + 1 for s, e in pairwise(offsets) for t in range(max(s, piece[0]), min(e, piece[1])))


def test_known_figures() -> None:
    """8 ranks, 2**20 tokens, MiniMax-Text-01 in bfloat16."""
    found = by_name(Layer(Model(), Rates(), 8, 2**20))
    assert found["lightning, LASP+"].received_max == 28 * 2**20
    assert found["lightning, head all-to-all"].received_max == 7 * GIB
    for name in ("softmax, ring, contiguous", "softmax, ring, zigzag", "softmax, all-gather, contiguous"):
        assert found[name].received_max == 3.5 * GIB
    assert found["softmax, ring, contiguous"].received_mean == 1.75 * GIB
    assert found["softmax, head all-to-all"].received_max == 3.9375 * GIB
    # 7 of 8 rows there and back, and the counts
    assert (
        found["experts, EP dispatch + combine"].received_max == 2 * 7 * 2**17 * 2 // 8 * 6144 * 2 + 7 * 32 * 4
    )
    both = by_name(Layer(Model(), Rates(), 8, 2**20), "forward+backward")
    assert both["lightning, LASP+"].received_max == 56 * 2**20
    assert both["softmax, all-gather, contiguous"].received_max == 7 * GIB


def test_times() -> None:
    """By hand: rates of one and so on, no latency; what is hidden, and what is not."""
    rates = Rates(flops=1.0, memory=1e30, intra=4.0, inter=1.0, node=2, latency=0.0)
    model = Model(heads=4, kv_heads=2, head_dim=8, hidden=16, experts=4, top_k=1, intermediate=8)
    found = by_name(Layer(model, rates, 4, 64, ep=2, etp=2))
    state = 4 * 8 * 8 * 4
    lasp, zigzag = found["lightning, LASP+"], found["softmax, ring, zigzag"]
    assert (
        lasp.received_max == 3 * state and lasp.communication == 2 * state
    )  # two of three from another node
    assert zigzag.compute == 4 * 8 * 4 * (64 * 65 // 2) / 4  # a quarter of the pairs each
    assert zigzag.exposed == max(zigzag.communication - zigzag.compute, 0)
    experts = found["experts, ETP all-gather + reduce-scatter"]
    assert experts.received_max == 2 * 16 * 16 * 2 and experts.communication == experts.received_max / 4
    slow = by_name(Layer(model, Rates(latency=1.0), 4, 64))["lightning, LASP+"]
    assert (
        slow.messages == 2 and slow.communication == pytest.approx(2.0) and slow.exposed == pytest.approx(2.0)
    )
    assert slow.time == pytest.approx(slow.compute + slow.exposed)


def test_documents() -> None:
    """Those that fit in a rank need no ring; the state of LASP+ travels all the same."""
    found = by_name(Layer(Model(), Rates(), 8, 2**15, document=2**12))
    assert found["softmax, ring, contiguous"].received_max == 0
    assert found["softmax, ring, contiguous"].communication == 0
    assert found["lightning, LASP+"].received_max == 28 * 2**20
    longer = by_name(Layer(Model(), Rates(), 8, 2**15, document=2**13))["softmax, ring, contiguous"]
    assert longer.received_max == 2**12 * 2 * 8 * 128 * 2 and longer.received_mean == longer.received_max / 2


def test_more_ranks_than_heads() -> None:
    found = by_name(Layer(Model(), Rates(), 128, 2**20))
    for name, row in found.items():
        assert (
            (row.impossible == "64 heads") == name.endswith("head all-to-all") == (row.received_max is None)
        )


def test_command(tmp_path: Path) -> None:
    """Tables, JSON and plot, all saying what they are."""
    path, plot = tmp_path / "s.json", tmp_path / "s.png"
    done = run(
        "--ranks",
        "8..32,128",
        "--tokens",
        "64K,128K",
        "--json",
        str(path),
        "--plot",
        str(plot),
        "--inter",
        "25e9",
    )
    assert done.exit_code == 0, done.output
    assert NOTE in done.output and "inter 2.5e+10" in done.output and "131,072 tokens" in done.output
    document = json.loads(path.read_text())
    assert document["note"] == NOTE and document["assumptions"]["inter"] == 25e9 and document["columns"]
    found = document["rows"]
    assert len(found) == 4 * 2 * len(OPERATIONS) * 2
    assert {row["pass"] for row in found} == {"forward", "forward+backward"}
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_usage() -> None:
    assert "Usage:" in run("--help").output
    for arguments in (
        ["--ranks", "x"],
        ["--tokens", "8..4"],
        ["--ranks", "8", "--tokens", "8"],
        ["--kv-heads", "7"],
    ):
        done = run(*arguments)
        assert done.exit_code == 2 and "Error" in done.output
    assert Sizes().convert("8..64,3", None, None) == [3, 8, 16, 32, 64]
    assert Sizes().convert("1M", None, None) == [2**20]
    assert [size(x) for x in (0, 999, 1024, 28 * 2**20, 7 * GIB, 2**42)] == [
        "0 B", "999 B", "1 KiB", "28 MiB", "7 GiB", "4 TiB",
    ]  # fmt: skip
