"""Generation against uncached forwards, beam search against transformers without a cache, and the command line."""

from typing import Any

import pytest
import torch
from models_support import relative, tiny_model, tokens, twin

from lightning_attn import LightningAttention, SparseMoE
from models.beam import Beams, search
from models.generate import generate, pad
from models.sampling import GREEDY, Sampling
from models.text import CausalLM

END = 84


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return tiny_model(21)


PROMPTS = [tokens(1, n, seed=n)[0].tolist() for n in (5, 1, 17, 9)]


@torch.no_grad()
def greedy(model: CausalLM, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] == END:
            break
    return ids[len(prompt) :]


def test_greedy_is_uncached(model: CausalLM) -> None:
    """Rows end at different steps, padding stands on either side, chunks are of any size."""
    alone = [greedy(model, prompt, 30) for prompt in PROMPTS]
    assert len({len(a) for a in alone}) > 1, "the rows should not all end together"
    seen: list[list[int | None]] = []
    assert generate(model, PROMPTS, max_new_tokens=30, eos=[END], on_tokens=seen.append) == alone
    assert [[step[b] for step in seen if step[b] is not None] for b in range(4)] == alone
    for side in ("left", "right"):
        ids, mask = pad(PROMPTS, side=side)
        for chunk in (1, 5, 100):
            args = {"attention_mask": mask, "max_new_tokens": 30, "eos": [END], "chunk": chunk}
            assert generate(model, ids, **args) == alone
            embeds = model.model.embed_tokens(ids).detach()
            assert generate(model, inputs_embeds=embeds, **args) == alone


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_beams_are_those_of_transformers_uncached(model: CausalLM, width: int, penalty: float) -> None:
    theirs = twin(model, model.config)
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, num_beams=width, use_cache=False,
            do_sample=False, eos_token_id=END, pad_token_id=0, length_penalty=penalty, early_stopping=False,
        )  # fmt: skip
        expected.append(out[0, len(prompt) :].tolist())
    beams = Beams(width, penalty)
    assert generate(model, PROMPTS, max_new_tokens=10, eos=[END], method=beams) == expected
    alone = [generate(model, [p], max_new_tokens=10, eos=[END], method=beams)[0] for p in PROMPTS]
    assert alone == expected


def test_beams_wider_than_the_vocabulary() -> None:
    """All sequences of two tokens of four, so the best of all."""
    model = tiny_model(22, vocab_size=4)
    with torch.no_grad():
        pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4))
        ids = torch.cat([torch.tensor([[1, 2]]).expand(16, 2), pairs], 1)
        logp = model(ids).double().log_softmax(-1)
        scores = logp[:, 1].gather(1, pairs[:, :1]) + logp[:, 2].gather(1, pairs[:, 1:])
    best = pairs[scores[:, 0].argmax()].tolist()
    assert generate(model, [[1, 2]], max_new_tokens=2, eos=[], method=Beams(20)) == [best]


def test_a_conversation_goes_on_in_its_cache(model: CausalLM) -> None:
    """The last token that is returned has not been fed; beams leave the cache after the prompts."""
    cache = model.new_cache(1)
    first = generate(model, [PROMPTS[0]], max_new_tokens=4, eos=[], cache=cache)[0]
    assert cache.lengths == [len(PROMPTS[0]) + 3]
    second = generate(model, [[first[-1], 3, 4]], max_new_tokens=5, eos=[], cache=cache)[0]
    together = [*PROMPTS[0], *first, 3, 4]
    assert second == generate(model, [together], max_new_tokens=5, eos=[])[0]
    fresh = model.new_cache(1)
    beams = generate(model, [together], max_new_tokens=5, eos=[], cache=fresh, method=Beams(3))
    assert fresh.lengths == [len(together)]
    assert beams == generate(model, [together], max_new_tokens=5, eos=[], method=Beams(3))


def test_probabilities() -> None:
    """Against their definition, token by token."""
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0)).double() * 3
    for t, k, p in ((1.0, None, None), (0.7, 5, None), (1.3, None, 0.8), (1.0, 7, 0.5), (0.01, None, 0.9)):
        got = Sampling(temperature=t, top_k=k, top_p=p).probabilities(logits)
        for row, ours in zip(logits, got, strict=True):
            q = (row / t).softmax(-1)
            order = q.argsort(descending=True).tolist()[: k or 50]
            q = q / q[order].sum()
            kept, total = [], 0.0
            for token in order:
                if total >= (p or 2):
                    break
                kept.append(token)
                total += float(q[token])
            expected = torch.zeros_like(q)
            expected[kept] = q[kept] / q[kept].sum()
            assert relative(ours, expected) < 1e-9
    assert not Sampling(temperature=1e-4).probabilities(torch.tensor([[3e38, -3e38]])).isnan().any()


def test_sampling_is_repeatable_and_follows_the_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(20000, 4)
    sampling = Sampling(temperature=1.0, top_k=3)
    draws = sampling.choose(logits, torch.Generator().manual_seed(0))
    again = sampling.choose(logits, torch.Generator().manual_seed(0))
    assert torch.equal(draws, again)
    frequency = torch.bincount(draws, minlength=4) / 20000
    assert (frequency - sampling.probabilities(logits[:1])[0]).abs().max() < 0.015
    assert frequency[0] == 0


def test_top_k_comes_before_top_p() -> None:
    """Of the two that are kept the first has four sevenths."""
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    p = Sampling(temperature=1, top_k=2, top_p=0.5).probabilities(logits)
    assert p.tolist() == [[1, 0, 0, 0]]
    assert Sampling(temperature=1, top_p=0.5).probabilities(torch.zeros(1, 2)).tolist() == [[1, 0]]
    assert Sampling(temperature=1e-320).probabilities(logits).tolist() == [[1, 0, 0, 0]]


def test_beams_with_several_ends() -> None:
    """All of the likeliest 2 W are ends, and still W beams go on: 6 and then 7 is the best."""
    first = torch.full((1, 12), -50.0)
    first[0, [5, 0, 1, 2, 6]] = torch.tensor([6.0, 5.9, 5.8, 5.7, 5.6])

    def follow(rows: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(2, 12)
        logits[given == 6] = -50.0
        logits[given == 6, 7] = 0
        return logits

    assert search(first, follow, Beams(2), max_new_tokens=2, eos=[0, 1, 2]) == [[6, 7]]


def test_ends_of_any_kind(model: CausalLM) -> None:
    """A tensor of ends; none at all, though the config has some; a row that has ended takes no more tokens."""
    expected = generate(model, PROMPTS, max_new_tokens=20, eos=[END])
    for method in (GREEDY, Beams(2)):
        with_list = generate(model, PROMPTS, max_new_tokens=20, eos=[END], method=method)
        assert (
            generate(model, PROMPTS, max_new_tokens=20, eos=torch.tensor([END]), method=method) == with_list
        )
    ending = tiny_model(21, eos_token_id=END)
    assert generate(ending, PROMPTS, max_new_tokens=20) == expected
    assert all(len(r) == 20 for r in generate(ending, PROMPTS, max_new_tokens=20, eos=[]))
    cache = model.new_cache(4)
    generate(model, PROMPTS, max_new_tokens=20, eos=[END], cache=cache)
    assert cache.lengths == [len(p) + len(r) - 1 for p, r in zip(PROMPTS, expected, strict=True)]


def test_what_generate_hands_on(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator of sampling, the chunk of the prefill and the backend."""
    hot = Sampling(temperature=3.0)
    drawn = [
        generate(
            model, PROMPTS, max_new_tokens=9, eos=[], method=hot, generator=torch.Generator().manual_seed(s)
        )
        for s in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    done: list[int] = []
    generate(model, PROMPTS, max_new_tokens=1, eos=[], chunk=5, on_chunk=done.append)
    assert done == [5, 10, 15, 17]
    seen: list[str] = []
    for module, name in (
        (LightningAttention, "forward"),
        (LightningAttention, "decode"),
        (SparseMoE, "forward"),
    ):
        original = getattr(module, name)

        def spy(*args: Any, original: Any = original, **options: Any) -> Any:
            seen.append(options["backend"])
            return original(*args, **options)

        monkeypatch.setattr(module, name, spy)
    generate(model, [[1, 2, 3]], max_new_tokens=3, eos=[], backend="reference")
    assert len(seen) > 10 and set(seen) == {"reference"}


def test_default_end_of_sentence() -> None:
    """The config's; 200020 for the released vocabulary, though its config.json has null."""
    model = tiny_model(21, eos_token_id=(3, END))
    assert [generate(model, [p], max_new_tokens=30)[0] for p in PROMPTS] == generate(
        model, PROMPTS, max_new_tokens=30, eos=[3, END]
    )


def test_nothing_to_do(model: CausalLM) -> None:
    assert generate(model, [[1, 2]], max_new_tokens=0) == [[]]
    assert generate(model, [], max_new_tokens=3) == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"prompts": [[1], []]}, "empty one"),
        ({"prompts": [[1, 200064]]}, r"in \[0, 97\), got 200064"),
        ({"prompts": None}, "both or neither"),
        ({"prompts": [[1]], "max_new_tokens": -1}, "max_new_tokens an int >= 0"),
        ({"prompts": [[1]], "max_new_tokens": 2.5}, "max_new_tokens an int >= 0"),
        ({"prompts": [[1]], "method": "greedy"}, "method Sampling"),
        ({"prompts": [[1.7]]}, "lists of token ids"),
        ({"prompts": [1, 2]}, "lists of token ids"),
        ({"prompts": "ab"}, "lists of token ids"),
        ({"prompts": tokens(3)}, "another shape"),
        ({"prompts": [[1]], "chunk": 1.5}, "chunk an int >= 1"),
        ({"prompts": [[1]], "attention_mask": torch.ones(1, 1)}, "attention_mask with a tensor"),
        ({"prompts": tokens(1, 3), "attention_mask": torch.ones(1, 2)}, "attention_mask"),
    ],
)
def test_bad_calls(model: CausalLM, args: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        generate(model, **{"max_new_tokens": 2, **args})  # type: ignore[arg-type]


def test_a_model_of_another_kind() -> None:
    with pytest.raises(TypeError, match="expected a CausalLM, got Linear"):
        generate(torch.nn.Linear(2, 2), [[1]], max_new_tokens=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sampling(temperature=-1), "temperature"),
        (lambda: Sampling(temperature=float("nan")), "temperature"),
        (lambda: Sampling(temperature=1, top_k=0), "top_k"),
        (lambda: Sampling(temperature=1, top_p=0), "top_p"),
        (lambda: Sampling(top_k=3), "greedy"),
        (lambda: Sampling(top_k=2.5, temperature=1), "top_k"),  # type: ignore[arg-type]
        (lambda: Sampling(temperature="1"), "temperature"),  # type: ignore[arg-type]
        (lambda: GREEDY.choose(torch.tensor([[0.0, torch.nan]])), "without NaN"),
        (lambda: Beams(0), "width"),
        (lambda: Beams("2"), "width"),  # type: ignore[arg-type]
        (lambda: Beams(2, float("nan")), "length_penalty"),
        (lambda: pad([[1]], side="middle"), "side"),
    ],
)
def test_bad_settings(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()
