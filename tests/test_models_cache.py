"""What is cached changes no logit: any split, padding, rollback, beams; against uncached forwards of the rows alone."""

import itertools
import random

import pytest
import torch
from models_support import relative, tiny_model, tokens
from torch import Tensor

from models.cache import Cache
from models.generate import pad, prefill
from models.text import CausalLM

T = 24
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=[None, 6], ids=["full", "window"])
def model(request: pytest.FixtureRequest) -> CausalLM:
    return tiny_model(11, num_hidden_layers=4, attn_type_list=(0, 1, 0, 1), sliding_window=request.param)


@torch.no_grad()
def feed(model: CausalLM, cache: Cache, ids: Tensor, sizes: list[int], **inputs: Tensor) -> Tensor:
    """The logits of all tokens, fed `sizes` at a time."""
    parts = [model(part, cache=cache, **inputs) for part in ids.split(sizes, dim=1)]
    return torch.cat(parts, dim=1)


@torch.no_grad()
def test_every_split(model: CausalLM) -> None:
    """In two, at every place; and in pieces of every size."""
    ids = tokens(2, T)
    whole = model(ids)
    for cut in range(1, T):
        assert relative(feed(model, model.new_cache(2), ids, [cut, T - cut]), whole) < TOLERANCE, cut
    for size in range(1, T):
        sizes = [size] * (T // size) + [T % size] * bool(T % size)
        assert relative(feed(model, model.new_cache(2), ids, sizes), whole) < TOLERANCE, size


@torch.no_grad()
def test_random_splits_with_random_padding(model: CausalLM) -> None:
    """Each row's tokens stand anywhere among padding, so that rows hold different numbers at every step."""
    draw = random.Random(0)
    for trial in range(6):
        rows = [tokens(1, draw.randint(1, T), seed=10 * trial + b)[0] for b in range(3)]
        steps = [draw.choice([1, 1, 2, 5]) for _ in range(60)]
        cache, left = model.new_cache(3), [row.tolist() for row in rows]
        got: list[list[Tensor]] = [[], [], []]
        for n in steps:
            mask = torch.rand(3, n, generator=torch.Generator().manual_seed(draw.randrange(1 << 30))) < 0.6
            ids = torch.full((3, n), 96)
            for b, t in itertools.product(range(3), range(n)):
                mask[b, t] &= bool(left[b])
                if mask[b, t]:
                    ids[b, t] = left[b].pop(0)
            logits = model(ids, attention_mask=mask, cache=cache)
            for b in range(3):
                got[b] += list(logits[b, mask[b]])
        assert cache.lengths == [len(row) - len(rest) for row, rest in zip(rows, left, strict=True)]
        for row, ours in zip(rows, got, strict=True):
            assert not ours or relative(torch.stack(ours), model(row[None, : len(ours)])[0]) < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_prefill_in_chunks_of_padded_prompts(model: CausalLM, side: str) -> None:
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (1, 7, 20, 13)]
    ids, mask = pad(prompts, side=side)
    expected = torch.stack([model(torch.tensor([p]))[0, -1] for p in prompts])
    for chunk in (1, 2, 3, 7, 19, 20, 100):
        done: list[int] = []
        cache = model.new_cache(4)
        logits = prefill(model, cache, ids, attention_mask=mask, chunk=chunk, on_chunk=done.append)
        assert relative(logits, expected) < TOLERANCE, chunk
        assert cache.lengths == [1, 7, 20, 13] and done[-1] == 20 and len(done) == -(-20 // chunk)


@torch.no_grad()
def test_rollback_to_every_length(model: CausalLM) -> None:
    """After steps of several sizes; what follows is as if the rest had never been."""
    ids, other = tokens(2, 37), tokens(2, 10, seed=5)
    for length in range(38):
        cache = model.new_cache(2)
        feed(model, cache, ids, [18, 1, 1, 9, *[1] * 8])
        cache.crop(length)
        assert cache.lengths == [length] * 2
        after = feed(model, cache, other, [1, 9])
        expected = model(torch.cat([ids[:, :length], other], 1))[:, length:]
        assert relative(after, expected) < TOLERANCE, length


@torch.no_grad()
def test_rows_roll_back_by_themselves(model: CausalLM) -> None:
    """To lengths of their own, again and again, before what is pending was run, and forward after it."""
    draw = random.Random(1)
    cache = model.new_cache(3)
    rows: list[list[int]] = [[], [], []]
    for trial in range(40):
        if draw.random() < 0.5:
            n = draw.choice([1, 1, 3, 18])
            ids = tokens(3, n, seed=trial)
            logits = model(ids, cache=cache)
            for b in range(3):
                rows[b] += ids[b].tolist()
                assert relative(logits[b], model(torch.tensor([rows[b]]))[0, -n:]) < TOLERANCE
        else:
            lengths = [max(len(row) - draw.choice([0, 1, 5, 30]), 0) for row in rows]
            cache.crop(lengths)
            rows = [row[:n] for row, n in zip(rows, lengths, strict=True)]
        assert cache.lengths == [len(row) for row in rows]


@torch.no_grad()
def test_few_snapshots_and_short_reruns() -> None:
    """About as many as the logarithm of the length; what is run again is not much longer than what is taken away."""
    model = tiny_model(12, num_hidden_layers=2, attn_type_list=(0, 1))
    cache = model.new_cache(1)
    ids = tokens(1, 2000)
    for part in ids.split(4, dim=1):
        model(part, cache=cache)
    assert 5 <= len(cache.snapshots) <= 20
    for back in (1, 10, 100, 500):
        length = cache.lengths[0] - back
        cache.crop(length)
        assert cache.pending is not None and cache.pending[0].shape[1] <= 2 * back + 2 * Cache.SNAPSHOT_EVERY
        model(ids[:, length : length + 1], cache=cache)
        assert cache.pending is None


@torch.no_grad()
def test_rollback_beyond_the_window() -> None:
    """What a window has forgotten is run again from a place where it is whole."""
    model = tiny_model(13, num_hidden_layers=2, attn_type_list=(0, 1), sliding_window=6)
    ids = tokens(1, 200)
    whole = model(ids)
    for length in range(0, 200, 9):
        cache = model.new_cache(1)
        feed(model, cache, ids, [4] * 50)
        assert cache.softmax[1].dropped[0] > 150
        cache.crop(length)
        assert relative(feed(model, cache, ids[:, length:], [1, 199 - length]), whole[:, length:]) < TOLERANCE


@torch.no_grad()
def test_a_failed_step_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some layers have taken its tokens and others not: the cache says so, and crop mends it."""
    model = tiny_model(14, num_hidden_layers=4, attn_type_list=(0, 1, 0, 1))
    ids = tokens(2, 40)
    whole = model(ids)
    for rollback in (True, False):
        cache = model.new_cache(2, rollback=rollback)
        feed(model, cache, ids[:, :25], [20, 1, 4])
        with monkeypatch.context() as patch:
            patch.setattr(model.model.layers[3].self_attn, "forward", None)
            with pytest.raises(TypeError):
                model(ids[:, 25:], cache=cache)
        with pytest.raises(ValueError, match="an error interrupted"):
            model(ids[:, 25:], cache=cache)
        if rollback:
            cache.crop(25)
            assert relative(model(ids[:, 25:], cache=cache), whole[:, 25:]) < TOLERANCE
        else:
            with pytest.raises(ValueError, match="rollback=True"):
                cache.crop(25)
            cache.crop(0)
            assert relative(model(ids, cache=cache), whole) < TOLERANCE


@torch.no_grad()
def test_windows_bound_the_cache() -> None:
    model = tiny_model(13, num_hidden_layers=2, attn_type_list=(0, 1), sliding_window=6)
    cache = model.new_cache(1, rollback=False)
    ids, sizes = tokens(1, 400), []
    whole = model(ids)
    for at, part in enumerate(ids.split(10, dim=1)):
        assert relative(model(part, cache=cache), whole[:, 10 * at : 10 * at + 10]) < TOLERANCE
        sizes.append(cache.nbytes)
    assert max(sizes[3:]) == min(sizes[3:])


@torch.no_grad()
def test_rollback_without_states() -> None:
    """Where there are only keys and values nothing is run again."""
    for window in (None, 5):
        model = tiny_model(11, num_hidden_layers=2, attn_type_list=(1, 1), sliding_window=window)
        ids, cache = tokens(1, 40), model.new_cache(1)
        whole = model(ids)
        feed(model, cache, ids, [20, 20])
        for length in (39, 17, 3, 0):
            cache.crop(length)
            assert cache.pending is None or window is not None
            assert relative(model(ids[:, length:], cache=cache), whole[:, length:]) < TOLERANCE


@torch.no_grad()
def test_select_moves_rows(model: CausalLM) -> None:
    """To another batch size, with what is pending and what can be gone back to."""
    ids = tokens(3, 30)
    cache = model.new_cache(3)
    feed(model, cache, ids[:, :9], [7, 1, 1])
    cache.select([2, 0, 0, 1])
    picked = ids[[2, 0, 0, 1]]
    assert relative(feed(model, cache, picked[:, 9:12], [3]), model(picked[:, :12])[:, 9:]) < TOLERANCE
    cache.crop([3, 12, 5, 0])
    cache.select([1, 2, 3])
    rows = [picked[1, :12], picked[2, :5], picked[3, :0]]
    new = tokens(3, 4, seed=3)
    logits = model(new, cache=cache)
    for b, row in enumerate(rows):
        assert relative(logits[b], model(torch.cat([row, new[b]])[None])[0, -4:]) < TOLERANCE


@torch.no_grad()
def test_snapshots_of_another_way_are_forgotten() -> None:
    """Back to 10, on by other tokens, and back to 25: not to the states that the first tokens left at 20."""
    model = tiny_model(11, num_hidden_layers=4, attn_type_list=(0, 1, 0, 1))
    first, other = tokens(1, 40), tokens(1, 40, seed=5)
    cache = model.new_cache(1)
    feed(model, cache, first, [20, 20])
    cache.crop(10)
    model(other[:, :30], cache=cache)
    cache.crop(25)
    expected = model(torch.cat([first[:, :10], other], 1))[:, 25:]
    assert relative(model(other[:, 15:], cache=cache), expected) < TOLERANCE


@torch.no_grad()
def test_select_moves_what_rows_can_go_back_to() -> None:
    """Rows of 40 and 3 tokens at the snapshot change places."""
    model = tiny_model(11, num_hidden_layers=4, attn_type_list=(0, 1, 0, 1))
    ids, mask, new = tokens(2, 60), torch.ones(2, 40), tokens(2, 4, seed=3)
    mask[1, 3:] = 0
    cache = model.new_cache(2)
    model(ids[:, :40], attention_mask=mask, cache=cache)
    model(ids[:, 40:], cache=cache)
    cache.select([1, 0])
    cache.crop([22, 50])
    rows = [torch.cat([ids[1, :3], ids[1, 40:59], new[0]]), torch.cat([ids[0, :50], new[1]])]
    for logits, row in zip(model(new, cache=cache), rows, strict=True):
        assert relative(logits, model(row[None])[0, -4:]) < TOLERANCE


@torch.no_grad()
def test_rows_that_forgot_unequally() -> None:
    """A row of many tokens and one of few in a window; they change places; the short one catches up by itself."""
    model = tiny_model(11, num_hidden_layers=4, attn_type_list=(0, 1, 0, 1), sliding_window=6)
    ids, mask, new = tokens(2, 30), torch.ones(2, 30), tokens(2, 4, seed=3)
    mask[1, 3:] = 0
    for swapped in (True, False):
        cache = model.new_cache(2, rollback=False)
        for part, real in zip(ids.split(5, 1), mask.split(5, 1), strict=True):
            model(part, attention_mask=real, cache=cache)
        rows = [ids[0], ids[1, :3]]
        if swapped:
            cache.select([1, 0])
            rows = rows[::-1]
        else:
            for token in tokens(27, seed=7).split(1):
                model(token.expand(2, 1), attention_mask=torch.tensor([[0], [1]]), cache=cache)
            rows[1] = torch.cat([rows[1], tokens(27, seed=7)])
            assert cache.lengths == [30, 30]
        for logits, row, last in zip(model(new, cache=cache), rows, new, strict=True):
            assert relative(logits, model(torch.cat([row, last])[None])[0, -4:]) < TOLERANCE


@torch.no_grad()
def test_snapshots_are_seldom() -> None:
    """Sixteen tokens of a row apart at least, whatever the batch; memory grows by doubling."""
    model = tiny_model(12, num_hidden_layers=2, attn_type_list=(0, 1))
    cache = model.new_cache(8)
    feed(model, cache, tokens(8, 6), [4, 1, 1])
    assert not cache.snapshots
    single, places = model.new_cache(1), set()
    for token in tokens(1, 300).split(1, dim=1):
        model(token, cache=single)
        assert single.softmax[1].buffer is not None
        places.add(single.softmax[1].buffer.shape[1])
    assert len(places) <= 11


@torch.no_grad()
def test_router_logits_are_of_the_new_tokens() -> None:
    """In the order of the layers; not of what crop left to be run again."""
    model = tiny_model(12, num_hidden_layers=2, attn_type_list=(0, 1))
    ids, cache = tokens(2, 20), model.new_cache(2)
    seen: list[Tensor] = []
    hooks = [
        layer.block_sparse_moe.gate.register_forward_hook(lambda gate, x, y: seen.append(y))
        for layer in model.model.layers
    ]
    _, expected = model(ids[:, :12], return_router_logits=True)
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    for hook in hooks:
        hook.remove()
    model(ids, cache=cache)
    cache.crop([10, 7])
    _, router = model(torch.stack([ids[0, 10:12], ids[1, 7:9]]), cache=cache, return_router_logits=True)
    for ours, whole in zip(router, expected, strict=True):
        whole = whole.view(2, 12, -1)
        assert relative(ours.view(2, 2, -1), torch.stack([whole[0, 10:12], whole[1, 7:9]])) < TOLERANCE


@torch.no_grad()
def test_nothing_new() -> None:
    """No tokens, or no rows."""
    model = tiny_model(11, num_hidden_layers=4, attn_type_list=(0, 1, 0, 1))
    cache = model.new_cache(2)
    for n in (0, 3, 0):
        assert model(tokens(2, n), cache=cache).shape == (2, n, 97)
    assert cache.lengths == [3, 3]
    assert model(tokens(0, 5), cache=model.new_cache(0)).shape == (0, 5, 97)
    assert model(tokens(1, 0), cu_seqlens=torch.tensor([0, 0])).shape == (1, 0, 97)
    assert model(tokens(2, 0), attention_mask=torch.ones(2, 0)).shape == (2, 0, 97)


def test_a_cache_filled_in_inference_mode() -> None:
    model, ids = tiny_model(14), tokens(1, 40)
    cache = model.new_cache(1)
    with torch.inference_mode():
        feed(model, cache, ids[:, :25], [20, 5])
    with torch.no_grad():
        cache.crop(22)
        assert relative(model(ids[:, 22:], cache=cache), model(ids)[:, 22:]) < TOLERANCE


@torch.no_grad()
def test_plain_errors_leave_the_cache_whole() -> None:
    model, ids = tiny_model(14), tokens(1, 9)
    cache, other = model.new_cache(1), tiny_model(14, sliding_window=3).new_cache(1)
    model(ids[:, :4], cache=cache)
    for inputs in (
        {"input_ids": ids, "backend": "bogus"},
        {"input_ids": ids - 500},
        {"input_ids": ids.tolist()},
        {"input_ids": ids, "attention_mask": [1] * 9},
        {"inputs_embeds": torch.zeros(1, 2, model.config.hidden_size, dtype=torch.float64)},
        {"input_ids": ids, "cache": other},
        {"input_ids": ids, "cache": 5},
    ):
        with pytest.raises((ValueError, TypeError), match="TextModel: expected"):
            model(**{"cache": cache, **inputs})
    assert relative(model(ids[:, 4:], cache=cache), model(ids)[:, 4:]) < TOLERANCE
    for size in (-1, 1.5):
        with pytest.raises(ValueError, match="batch_size"):
            model.new_cache(size)  # type: ignore[arg-type]


@torch.no_grad()
def test_finished_rows_keep_their_state() -> None:
    model = tiny_model(14)
    cache = model.new_cache(2)
    model(tokens(2, 5), cache=cache)
    before = {layer: state.clone() for layer, state in cache.states.items()}
    model(tokens(2, 1), attention_mask=torch.tensor([[1], [0]]), cache=cache)
    assert cache.lengths == [6, 5]
    for layer, state in cache.states.items():
        assert torch.equal(state[1], before[layer][1]) and not torch.equal(state[0], before[layer][0])


def test_states_are_updated_in_place_and_in_float32() -> None:
    model = tiny_model(14, dtype=torch.bfloat16)
    cache = model.new_cache(2)
    model(tokens(2, 5), cache=cache)
    places = {layer: state.data_ptr() for layer, state in cache.states.items()}
    for n in (1, 3):
        logits = model(tokens(2, n), cache=cache)
        assert not logits.requires_grad
    assert places == {layer: state.data_ptr() for layer, state in cache.states.items()}
    assert all(state.dtype == torch.float32 for state in cache.states.values())


@torch.no_grad()
def test_bfloat16_is_as_near_cached_as_uncached() -> None:
    """Against the same weights in float64."""
    model = tiny_model(15, dtype=torch.bfloat16)
    ids = tokens(1, 40)
    cached = feed(model, model.new_cache(1), ids, [10, 1, 1, 8, *[1] * 20]).double()
    uncached = model(ids).double()
    exact = model.double()(ids)
    assert relative(cached, exact) < 2 * relative(uncached, exact) + 2e-3


@torch.no_grad()
def test_float64() -> None:
    model = tiny_model(16, dtype=torch.float64)
    ids = tokens(1, 30)
    assert relative(feed(model, model.new_cache(1), ids, [9, 1, 20]), model(ids)) < 1e-12


def test_bad_calls() -> None:
    model = tiny_model(0)
    cache = model.new_cache(2, rollback=False)
    model(tokens(2, 4), cache=cache)
    with pytest.raises(ValueError, match="rollback=True"):
        cache.crop(2)
    cache.crop(4)
    cache.crop(9)
    assert cache.lengths == [4, 4]
    cache.crop(torch.tensor(4))  # type: ignore[arg-type]
    for wrong in (-1, [1], [1, 2, 3], [1, -2], 1.5):
        with pytest.raises((ValueError, TypeError), match="crop"):
            cache.crop(wrong)  # type: ignore[arg-type]
    for wrong in ([2], [-1], [[0]], [0.5]):
        with pytest.raises(ValueError, match="select"):
            cache.select(wrong)
    cache.crop(0)
    assert cache.lengths == [0, 0]
    with torch.no_grad():
        assert relative(model(tokens(2, 6), cache=cache), model(tokens(2, 6))) < TOLERANCE
    with pytest.raises(ValueError, match="cu_seqlens without cache"):
        model(tokens(1, 4), cu_seqlens=torch.tensor([0, 4]), cache=model.new_cache(1))
    with pytest.raises(ValueError, match="empty one"):
        prefill(model, model.new_cache(2), tokens(2, 3), attention_mask=torch.tensor([[1, 1, 0], [0, 0, 0]]))
    with pytest.raises(ValueError, match="chunk"):
        prefill(model, model.new_cache(2), tokens(2, 3), chunk=0)
