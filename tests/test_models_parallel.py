"""The text model across four gloo ranks against the dense one in a process: training steps, packed documents, chunked prefill; the
command; and what a rank's death does to the others.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner, Result
from models_ranks_support import (
    CONFIG,
    RANKS,
    SIZES,
    alone,
    dense_model,
    finished,
    fresh_ranks,
    gradients,
    offsets,
    own_text,
    prompts_of,
    torchrun,
    world_of,
)
from models_support import relative, tokens
from ranks_support import Ranks, free_port
from support import assert_same_bits

from lightning_attn.distributed import even_cuts
from lightning_attn.distributed.comm import timeout
from models import checkpoint, generate, train_tiny
from models.context import ContextParallel
from models.parallel import Sizes, World, experts_of, gather, parallelize
from models.placement import plan
from models.sharded import prefill
from models.text import CausalLM
from models.training import Across

Group = dist.ProcessGroup
PATIENCE = 120.0  # seconds, of the ranks that live


@pytest.fixture(scope="module")
def pool() -> Iterator[Ranks]:
    with fresh_ranks(timeout=PATIENCE) as ranks:
        yield ranks


# ---- a training step -------------------------------------------------------------------------------------------------

BALANCE = 0.3
# Rows that two or four replicas do not share evenly, tokens that two or four ranks do not; the last leaves ranks without any.
BATCHES = ((3, 13), (5, 6), (1, 3))
LARGE, SMALL = 3.0, 1e-3  # times the loss: its gradient is clipped, or it is not


def training_steps(group: Group, sizes: list[Sizes]) -> list[tuple[float, str]]:
    """The largest distance from one process, and where, of each."""
    found = []
    for turn, shares in enumerate(sizes):
        world, worst = world_of(shares), (0.0, "")
        for number in (0, 1 + (turn + turn // 6) % 2):  # each share of experts has both at some cp
            rows, length = BATCHES[number]
            factor = SMALL if number == 1 else LARGE
            want = alone(rows, length, BALANCE, factor)
            assert (want["norm"] > 2) == (factor == LARGE) and (want["norm"] < 0.5) == (factor == SMALL)
            again = [
                gradients(Across(dense_model(), world), tokens(rows, length + 1), BALANCE, factor)
                for _ in range(2 if number == 0 and turn % 2 else 1)
            ]
            got = again[0]
            for other in again[1:]:
                assert_same_bits(other["total"], got["total"], "total")
                for name, y in other["gradients"].items():
                    assert_same_bits(y, got["gradients"][name], name)
            dist.all_reduce(got["total"])  # the sum of the shares
            pairs = {name: (got[name], want[name]) for name in ("total", "entropy")}
            pairs |= {name: (got["gradients"][name], y) for name, y in want["gradients"].items()}
            assert pairs.keys() == {"total", "entropy", *dict(dense_model().named_parameters())}
            for name, (ours, theirs) in pairs.items():
                worst = max(worst, (relative(ours, theirs), f"{name} of {shares} {rows=} {length=}"))
        found.append(worst)
    return found


def test_training_step(pool: Ranks) -> None:
    """For every way to share out four ranks: the loss, its sum over the ranks, and all gradients, clipped and not, are those of one
    process; two runs give the same bits.
    """
    for of_rank in pool.run(training_steps, SIZES):
        for error, where in of_rank:
            assert error < 1e-12, where


# ---- packed documents ------------------------------------------------------------------------------------------------

PACKINGS = [
    ((23,), (0, 6, 12, 18, 23)),
    ((5, 0, 9, 1, 8), (0, 5, 14, 15, 23)),  # cut where documents begin
    ((0, 7, 16, 0), (0, 1, 1, 20, 23)),  # a document on three ranks, one of which has nothing
    ((3, 4), (0, 0, 0, 0, 7)),
    ((0,), (0, 0, 0, 0, 0)),
]
LAYOUTS = [Sizes(1, 2, 2), Sizes(2, 1, 1), Sizes(2, 2, 1), Sizes(4, 1, 1), Sizes(4, 2, 2), Sizes(4, 1, 4)]


@torch.no_grad()
def packed_documents(group: Group) -> list[tuple[float, str]]:
    """Distances of this rank's logits and router logits from those of the dense model, given the documents of its replica."""
    dense, found = dense_model(), []
    for shares in LAYOUTS:
        world = world_of(shares)
        model = parallelize(dense_model(), world, groups=2)
        for method in ("ring", "all_gather"):
            for number, (lengths, cuts) in enumerate(PACKINGS):
                at = tuple(cuts[i * RANKS // shares.cp] for i in range(shares.cp + 1))
                ids = tokens(1, cuts[-1], seed=number + 10 * world.replica)
                want, router = dense(
                    ids, cu_seqlens=torch.tensor(offsets(lengths)), return_router_logits=True
                )
                context = ContextParallel(offsets(lengths), at, world.cp, method)
                own = slice(*context.own)
                logits, ours = model(ids[:, own], context=context, return_router_logits=True)
                assert logits.shape == (1, own.stop - own.start, CONFIG.vocab_size)
                pairs = [(logits, want[:, own]), *((a, b[own]) for a, b in zip(ours, router, strict=True))]
                for a, b in pairs:
                    if b.numel():
                        found.append((relative(a, b), f"{shares} {method} {lengths} {at}"))
    return found


def test_packed_documents(pool: Ranks) -> None:
    """Cuts anywhere, empty documents, empty ranks, other documents on each replica; experts in two token groups."""
    for of_rank in pool.run(packed_documents):
        assert len(of_rank) > 50
        for error, where in of_rank:
            assert error < 1e-10, where


def refused(group: Group) -> None:
    world = world_of(Sizes(cp=4))
    model, ids, T = dense_model(), tokens(1, 3), 12
    context = ContextParallel((0, T), (0, 3, 6, 9, T), world.cp)
    assert len(ids[0]) == context.own[1] - context.own[0]
    together = "expected context without attention_mask, cu_seqlens and cache"
    for wrong, message in (
        ({"cache": model.new_cache(1)}, together),
        ({"attention_mask": torch.ones(1, 3)}, together),
        ({"cu_seqlens": torch.tensor([0, 3])}, together),
        ({"input_ids": tokens(1, 4)}, "expected the 3 tokens of this rank, got 4"),
        ({"input_ids": tokens(1, 0)}, "expected the 3 tokens of this rank, got 0"),
        ({"input_ids": tokens(3, 1)}, "expected B = 1 with cu_seqlens or context, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**{"input_ids": ids, "context": context, **wrong})
    windowed = CausalLM(replace(CONFIG, sliding_window=5), dtype=torch.float64)
    with pytest.raises(ValueError, match="expected no sliding_window with context"):
        windowed(ids, context=context)
    for prompts, more, message in (
        ([[1], []], {}, "a token at least in each prompt"),
        ([[1]], {"chunk": 0}, "chunk an int >= 1, got 0"),
        ([[1]], {"chunk": 2.5}, "chunk an int >= 1, got 2.5"),
    ):
        with pytest.raises(ValueError, match=message):
            prefill(model, prompts, world.cp, **more)
    for sizes, message in (
        (Sizes(cp=3), "expected cp = 3 to divide the 4 ranks"),
        (Sizes(cp=8), "expected cp = 8 to divide the 4 ranks"),
        (Sizes(ep=2, etp=3), "expected ep x etp = 6 to divide the 4 ranks"),
        (Sizes(cp=4, ep=2, etp=4), "expected ep x etp = 8 to divide the 4 ranks"),
    ):
        with pytest.raises(ValueError, match=message):
            World(sizes)
    three = dense_model(config=replace(CONFIG, num_local_experts=3))
    with pytest.raises(ValueError, match="a number of experts divisible by ep = 2, got 3"):
        parallelize(three, world_of(Sizes(1, 2, 2)))


def test_refused(pool: Ranks) -> None:
    """Before anything is sent: what contradicts a context, prompts, sizes of the world and of the experts."""
    pool.run(refused)


def timeouts(group: Group) -> set[float]:
    found = set()
    for sizes in (Sizes(2, 2, 1), Sizes(1, 2, 2)):
        world = world_of(sizes)
        found |= {timeout(g).total_seconds() for g in (world.cp, *world.experts.get_all_groups())}
    return found


def test_timeout(pool: Ranks) -> None:
    """Every group of a world has that of the default group."""
    assert pool.run(timeouts) == [{PATIENCE}] * RANKS


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("", Sizes()),
        ("cp=2", Sizes(cp=2)),
        ("cp=2,ep=4,etp=8", Sizes(2, 4, 8)),
        ("etp=2, cp=16,", Sizes(16, 1, 2)),
    ],
)
def test_sizes(text: str, sizes: Sizes) -> None:
    assert Sizes.parse(text) == sizes


@pytest.mark.parametrize(
    "text", ["cp", "cp=", "cp=0", "cp=-1", "cp=1.5", "dp=2", "cp=2,cp=2", "cp=2;ep=2", "=2", "cp=2=2"]
)
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="expected cp=N,ep=N,etp=N with N >= 1, got") as error:
        Sizes.parse(text)
    assert repr(text) in str(error.value)


# ---- the model's parts -----------------------------------------------------------------------------------------------


@torch.no_grad()
def placed_and_gathered(group: Group) -> None:
    ids = tokens(1, 8)
    for sizes in (Sizes(), Sizes(4, 1, 4), Sizes(2, 2, 2), Sizes(1, 4, 1)):
        world, dense = world_of(sizes), dense_model(torch.float32).eval()
        placed = CausalLM(CONFIG, device="meta")
        plan(placed, ["cpu", "cpu"]).apply(placed)
        placed.load_state_dict(dense.state_dict())
        model = parallelize(placed.eval(), world)
        held = sum(
            p.numel()
            for _, experts in experts_of(model)
            for n, p in experts.named_parameters()
            if "gate." not in n
        )
        every = sum(
            p.numel() for n, p in dense.named_parameters() if n.endswith(("gate_up_proj", "down_proj"))
        )
        assert held * sizes.ep * sizes.etp == every
        whole = gather(model)
        assert not whole.training and whole.state_dict().keys() == dense.state_dict().keys()
        for name, tensor in dense.state_dict().items():
            assert_same_bits(whole.state_dict()[name], tensor, name)
        assert_same_bits(whole(ids), dense(ids))
        cuts = tuple(range(0, 9, 8 // sizes.cp))
        context = ContextParallel((0, 8), cuts, world.cp)
        own = slice(*context.own)
        assert relative(model(ids[:, own], context=context), dense(ids)[:, own]) < 1e-5


def test_placed_and_gathered(pool: Ranks) -> None:
    """A model that was placed first is made parallel, each rank with its part of the experts; what is gathered from it is the dense
    model, bit for bit.
    """
    pool.run(placed_and_gathered)


# ---- chunked prefill -------------------------------------------------------------------------------------------------

# Prompts of each replica: of other lengths and numbers, so that some have fewer chunks than others.
PROMPTS = ((1, 9, 4, 1), (3,), (8, 2), (1, 1))
CHUNKS = (1, 7, 100)
DECODED = 3
PREFILLS = [
    Sizes(),
    Sizes(1, 4, 1),
    Sizes(2, 1, 1),
    Sizes(2, 2, 1),
    Sizes(4, 1, 1),
    Sizes(4, 2, 2),
    Sizes(2, 1, 4),
]


@torch.no_grad()
def prefills(group: Group) -> list[tuple[float, str]]:
    found, dense = [], dense_model()
    for sizes in PREFILLS:
        world = world_of(sizes)
        model = dense if sizes == Sizes(4) else parallelize(dense_model(), world)
        lengths = PROMPTS[world.replica]
        prompts, rank = prompts_of(lengths, seed=10 * world.replica), dist.get_rank(world.cp)
        ids, mask = generate.pad(prompts)
        for chunk in CHUNKS:
            for method in ("ring", "all_gather") if chunk == 7 else ("ring",):
                where = f"{sizes} {chunk=} {method} replica {world.replica}"
                logits, sharded = prefill(model, prompts, world.cp, chunk=chunk, method=method)
                theirs = dense.new_cache(len(prompts))
                want = generate.prefill(dense, theirs, ids, attention_mask=mask)
                one_by_one = torch.cat([dense(torch.tensor([p]))[:, -1] for p in prompts])
                found += [(relative(logits, want), where), (relative(logits, one_by_one), where)]
                check_shares(sharded, lengths, chunk, rank, sizes.cp)
                cache = sharded.collect()
                assert cache.lengths == list(lengths)
                for step in range(DECODED):
                    new = tokens(len(prompts), seed=step)
                    running = None if step else tokens(len(prompts), seed=3, vocab=2).bool()
                    a = generate.advance(model, cache, new, running)
                    b = generate.advance(dense, theirs, new, running)
                    kept = slice(None) if running is None else running
                    if b[kept].numel():
                        found.append((relative(a[kept], b[kept]), f"step {step} after {where}"))
                assert cache.lengths == theirs.lengths
    return found


def check_shares(sharded: Any, lengths: tuple[int, ...], chunk: int, rank: int, ranks: int) -> None:
    """Keys and values of a rank's own tokens, states of the documents whose last token it had."""
    cu, T = offsets(lengths), sum(lengths)
    mine = []
    for begin in range(0, T, chunk):
        first, stop = even_cuts(min(chunk, T - begin), ranks)[rank : rank + 2]
        mine += range(begin + first, begin + stop)
    softmax = {layer for layer, kind in enumerate(CONFIG.attn_type_list) if kind}
    assert sharded.rows.keys() == softmax
    assert sharded.states.keys() == set(range(CONFIG.num_hidden_layers)) - softmax
    for rows in sharded.rows.values():
        assert rows.shape == (len(mine), 2, CONFIG.num_key_value_heads, CONFIG.head_dim)
        assert rows.untyped_storage().nbytes() == rows.nbytes
    for states in sharded.states.values():
        assert [bool(s.any()) for s in states] == [end - 1 in mine for end in cu[1:]]


def test_prefill(pool: Ranks) -> None:
    """Prompts of a token, of a chunk and of more; chunks of a token, of seven and of all; both ways of the ring; replicas that have
    fewer chunks than others, and rows that rest in a step. Logits, and a few steps from what was collected, are the dense model's.
    """
    for of_rank in pool.run(prefills):
        assert len(of_rank) > 100
        for error, where in of_rank:
            assert error < 1e-10, where


@torch.no_grad()
def some_prefill(group: Group) -> None:
    world, dense = world_of(Sizes(cp=2)), dense_model()
    if world.replica:
        return
    logits, _ = prefill(dense, prompts_of((9, 4)), world.cp, chunk=5)
    want = torch.cat([dense(torch.tensor([p]))[:, -1] for p in prompts_of((9, 4))])
    assert relative(logits, want) < 1e-10


def test_prefill_of_one_replica(pool: Ranks) -> None:
    """Without parallel experts it is the affair of its own group alone."""
    pool.run(some_prefill)


# ---- the command -----------------------------------------------------------------------------------------------------


def call(*args: object, environment: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(train_tiny.main, [str(a) for a in args], env=environment)


def test_command(tmp_path: Path) -> None:
    """Four processes and one: the same curve, and checkpoints of the same model, to the rounding of float32."""
    base = ("--text", own_text(tmp_path), "--steps", 4)
    files = ("--out", tmp_path / "four", "--json", tmp_path / "four.json")
    log = tmp_path / "log"
    process = torchrun(RANKS, *base, *files, "--parallel", "cp=2,ep=2", log=log)
    said = finished(process, log)
    assert said.count("saved in") == said.count("parameters,") == 1, said
    one = call(*base, "--out", tmp_path / "one", "--json", tmp_path / "one.json")
    assert one.exit_code == 0, one.output
    four, alone = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("four", "one"))
    assert four["ranks"] == {"world": 4, "cp": 2, "ep": 2, "etp": 1} and "ranks" not in alone
    assert four["recipe"] == alone["recipe"] and four["parameters"] == alone["parameters"]
    assert len(four["bits_per_byte"]) == 4 and alone["bits_per_byte"][-1] < alone["bits_per_byte"][0] - 0.05
    pairs = [*zip(four["bits_per_byte"], alone["bits_per_byte"], strict=True)]
    pairs.append((four["held_out_bits_per_byte"], alone["held_out_bits_per_byte"]))
    for ours, theirs in pairs:
        assert abs(ours - theirs) < 1.5e-4  # both are rounded to four decimals
    models = [checkpoint.load(tmp_path / name) for name in ("four", "one")]
    with torch.no_grad():
        for (name, ours), theirs in zip(models[0].state_dict().items(), models[1].parameters(), strict=True):
            assert relative(ours, theirs) < 1e-4, name
        logits = [model(tokens(2, 90, vocab=256)) for model in models]
    assert relative(*logits) < 1e-4
    assert {f.name for f in (tmp_path / "four").iterdir()} == {f.name for f in (tmp_path / "one").iterdir()}


def test_command_errors(tmp_path: Path) -> None:
    """Processes without sizes, sizes without processes, sizes that are none, or do not divide the ranks."""
    base = ("--text", own_text(tmp_path), "--steps", 1, "--out", tmp_path / "out")
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    alone = {"WORLD_SIZE": "1", "RANK": "0", "TORCHELASTIC_RUN_ID": "none", **port}
    several = {**alone, "WORLD_SIZE": "2"}
    try:
        for args, environment, message in (
            (("--parallel", "cp=2"), {}, "--parallel wants processes: torchrun --nproc-per-node N"),
            ((), several, "torchrun started several processes: say how they are shared out (--parallel)"),
            (("--parallel", "cp=two"), several, "expected cp=N,ep=N,etp=N with N >= 1, got 'cp=two'"),
            (("--parallel", "pp=2"), several, "expected cp=N,ep=N,etp=N with N >= 1, got 'pp=2'"),
            (("--parallel", "cp=2"), alone, "expected cp = 2 to divide the 1 ranks"),
            (("--checkpoint-every", -1), {}, "--checkpoint-every"),
        ):
            result = call(*base, *args, environment=environment)
            said = " ".join(result.output.replace("\u2502", " ").split())
            assert result.exit_code == 2 and message in said and "Traceback" not in said, result.output
            assert "parameters," not in said
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert not (tmp_path / "out").exists()


# ---- a rank dies -----------------------------------------------------------------------------------------------------

TIMEOUT = 5.0  # seconds
DEAD = 1


def dying(group: Group, stage: str, sizes: Sizes) -> tuple[str, float, bool]:
    """A training step in which a rank is killed -> of the others (error, seconds, whether anything of the run has changed)."""
    from models import training

    world = World(sizes)
    recipe = training.Recipe(batch=4, length=12, steps=4)
    run = training.start(CONFIG, recipe, world)
    text = tokens(200).to(torch.uint8)
    training.step(run, recipe, text)
    before = [p.detach().clone() for p in run.model.parameters()]
    moments = [s["exp_avg"].clone() for s in run.optimizer.state.values()]

    def die(*_: object, **__: object) -> None:
        if dist.get_rank() == DEAD:
            os.kill(os.getpid(), signal.SIGKILL)

    if stage == "forward":
        run.model.model.layers[2].register_forward_pre_hook(die)
    elif stage == "backward":
        run.model.model.layers[1].self_attn.o_proj.weight.register_hook(die)
    else:
        squares = training._squares
        training._squares = lambda tensors: (die(), squares(tensors))[1]
    begin, error = time.monotonic(), "none"
    try:
        training.step(run, recipe, text)
    except RuntimeError as raised:
        error = f"{type(raised).__name__}: {raised}"
    seconds = time.monotonic() - begin
    changed = len(run.curve) != 1 or {int(s["step"]) for s in run.optimizer.state.values()} != {1}
    for p, old in zip(run.model.parameters(), before, strict=True):
        changed |= not torch.equal(p, old)
    for s, old in zip(run.optimizer.state.values(), moments, strict=True):
        changed |= not torch.equal(s["exp_avg"], old)
    return error, seconds, changed


@pytest.mark.parametrize(
    ("stage", "sizes"),
    [("forward", Sizes(2, 2, 1)), ("backward", Sizes(4, 1, 2)), ("finish", Sizes(2, 2, 2))],
)
def test_a_rank_is_killed(stage: str, sizes: Sizes) -> None:
    """Row 29: in any stage of a step every other rank raises within the timeout, and none has stepped its optimizer."""
    with fresh_ranks(TIMEOUT) as ranks:
        for pipe in ranks.pipes:
            pipe.send((dying.__module__, dying.__qualname__, RANKS, (stage, sizes)))
        left = [rank for rank in range(RANKS) if rank != DEAD]
        begin = time.monotonic()
        for rank in left:
            assert ranks.pipes[rank].poll(max(0, begin + 4 * TIMEOUT - time.monotonic())), (
                f"rank {rank} waits"
            )
            ok, answer = ranks.pipes[rank].recv()
            assert ok, answer
            error, seconds, changed = answer
            assert error.startswith(("RankError: ", "RuntimeError: ", "DistBackendError: ")), error
            assert seconds < TIMEOUT + 2 and not changed, (rank, seconds, changed, error)
        ranks.processes[DEAD].join(5)
        assert ranks.processes[DEAD].exitcode == -signal.SIGKILL
