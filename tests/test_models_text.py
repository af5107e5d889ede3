"""The text model against transformers in one uncached float32 forward, its heads, its counts and its errors."""

import dataclasses
import types
from itertools import pairwise

import pytest
import torch
from models_support import randomize, relative, tiny_config, tiny_model, tokens, twin

from lightning_attn import load_balancing_loss, moe_route
from models import softmax, step
from models.config import LIGHTNING, TextConfig
from models.heads import QuestionAnswering, SequenceClassifier, TokenClassifier
from models.text import CausalLM


@pytest.mark.parametrize("seed", range(8))
@torch.no_grad()
def test_logits_are_those_of_transformers(seed: int) -> None:
    model = tiny_model(seed)
    ids = tokens(2, 70, seed=seed)
    theirs = twin(model, model.config)(ids, use_cache=False).logits
    assert relative(model(ids), theirs) < 1e-5


@torch.no_grad()
def test_blocks_longer_than_transformers_block() -> None:
    """Its lightning layers go by blocks of 256."""
    model = tiny_model(1)
    ids = tokens(1, 600)
    assert relative(model(ids), twin(model, model.config)(ids, use_cache=False).logits) < 1e-5


@torch.no_grad()
def test_lightning_layer_alone() -> None:
    model = tiny_model(2)
    theirs = twin(model, model.config)
    for layer, other in zip(model.model.layers, theirs.model.layers, strict=True):
        if layer.lightning:
            x = torch.randn(2, 40, model.config.hidden_size)
            assert relative(layer.self_attn(x), other.self_attn(x, None, None)[0]) < 1e-5


@torch.no_grad()
def test_eps_of_every_norm() -> None:
    """rms_norm_eps for the layers' and the last norm, 1e-6 for the one in lightning attention."""
    model = tiny_model(0, rms_norm_eps=0.3)
    ids = tokens(1, 20)
    assert relative(model(ids), twin(model, model.config)(ids, use_cache=False).logits) < 1e-5


@torch.no_grad()
def test_rope_turns_half_of_a_head() -> None:
    """By complex numbers in float64; the other half passes."""
    config = tiny_config(0, head_dim=16, rotary_dim=8)
    x = torch.randn(1, 9, 2, 16)
    s = step.build(1, 9, 8, config.rope_theta, device=x.device, starts=(1000,))
    frequency = config.rope_theta ** (-torch.arange(4).double() / 4)
    angle = (1000 + torch.arange(9).double())[:, None] * frequency
    pairs = torch.complex(x[..., :4].double(), x[..., 4:8].double())
    turned = pairs * torch.polar(torch.ones_like(angle), angle)[:, None]
    y = softmax.rotate(x, s)
    assert torch.equal(y[..., 8:], x[..., 8:])
    assert relative(y[..., :8].double(), torch.cat([turned.real, turned.imag], -1)) < 1e-4


def test_rope_at_four_million_tokens() -> None:
    """A float32 angle would be off by a quarter of a radian there."""
    cos, sin = step.rotary(torch.tensor([4_194_303]), 64, 1e7)
    frequency = (1.0 / 1e7 ** (torch.arange(0, 64, 2) / 64)).double()
    angle = 4_194_303 * frequency
    assert (cos[0] - angle.cos()).abs().max() < 1e-7 and (sin[0] - angle.sin()).abs().max() < 1e-7


@torch.no_grad()
def test_sliding_window_is_that_of_transformers() -> None:
    model = tiny_model(3, sliding_window=7)
    ids = tokens(2, 50)
    theirs = twin(model, model.config)(ids, use_cache=False).logits
    assert relative(model(ids), theirs) < 1e-5


@torch.no_grad()
def test_tiles_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small bound on the mask's size changes no result."""
    model = tiny_model(4, sliding_window=11)
    ids = tokens(3, 41)
    whole = model(ids)
    monkeypatch.setattr(softmax, "_MASK_ELEMENTS", 3 * 41 * 5)
    assert relative(model(ids), whole) < 1e-6


@pytest.mark.parametrize("padding", ["left", "right", "between"])
@torch.no_grad()
def test_padding_changes_nothing(padding: str) -> None:
    """Whatever stands there, NaN among it."""
    model = tiny_model(5)
    ids = tokens(2, 12)
    hole = {"left": slice(0, 5), "right": slice(12, 17), "between": slice(6, 11)}[padding]
    mask = torch.ones(2, 17, dtype=torch.bool)
    mask[1, hole] = False
    x = torch.full((2, 17, model.config.hidden_size), torch.nan)
    x[0] = model.model.embed_tokens(tokens(17, seed=9))
    x[1, mask[1]] = model.model.embed_tokens(ids[1])
    padded = model(inputs_embeds=x, attention_mask=mask)
    assert relative(padded[1, mask[1]], model(ids[1:])[0]) < 1e-5
    assert relative(padded[0], model(inputs_embeds=x[:1])[0]) < 1e-5


def test_gradients_with_padding_are_those_of_rows_alone() -> None:
    model = tiny_model(6)
    ids, mask = tokens(2, 15), torch.ones(2, 15, dtype=torch.bool)
    mask[1, :6] = False
    model(ids, attention_mask=mask)[mask].square().sum().backward()
    padded = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    (model(ids[:1]).square().sum() + model(ids[1:, 6:]).square().sum()).backward()
    for name, p in model.named_parameters():
        assert relative(padded[name], p.grad) < 1e-4, name


@pytest.mark.parametrize("window", [None, 5])
@torch.no_grad()
def test_packed_documents_are_separate_ones(window: int | None) -> None:
    model = tiny_model(7, sliding_window=window)
    ids = tokens(1, 40)
    bounds = [0, 1, 13, 13, 40]
    packed = model(ids, cu_seqlens=torch.tensor(bounds))
    for a, b in pairwise(bounds):
        if a < b:
            assert relative(packed[:, a:b], model(ids[:, a:b])) < 1e-5


@torch.no_grad()
def test_a_batch_is_its_rows() -> None:
    model = tiny_model(8)
    ids = tokens(5, 30)
    together = model(ids)
    for row, alone in zip(together, ids, strict=True):
        assert relative(row, model(alone[None])[0]) < 1e-5


@torch.no_grad()
def test_classifiers_are_those_of_transformers() -> None:
    config = tiny_config(1, pad_token_id=0)
    ids = tokens(3, 20).clamp(min=1)
    ids[1, :7], ids[2, 15:] = 0, 0
    mask = ids != 0
    heads = (
        (SequenceClassifier(config, 5), "MiniMaxForSequenceClassification"),
        (TokenClassifier(config, 5), "MiniMaxForTokenClassification"),
        (QuestionAnswering(config), "MiniMaxForQuestionAnswering"),
    )
    for model, name in heads:
        randomize(model.eval(), 3)
        labels = {} if name.endswith("Answering") else {"num_labels": 5}
        theirs = twin(model, config, name, **labels)
        # One row at a time: transformers decays its states by padding.
        for row, real in zip(ids, mask, strict=True):
            one = row[real][None]
            ours, other = model(one), theirs(one, use_cache=False)
            if name.endswith("Answering"):
                assert relative(ours[0], other.start_logits) < 1e-5
                assert relative(ours[1], other.end_logits) < 1e-5
            else:
                assert relative(ours, other.logits) < 1e-5
    classifier = heads[0][0]
    alone = torch.cat([classifier(row[real][None]) for row, real in zip(ids, mask, strict=True)])
    assert relative(classifier(ids), alone) < 1e-5, "the padding token marks padding on either side"
    packed = torch.cat([row[real] for row, real in zip(ids, mask, strict=True)])[None]
    bounds = torch.tensor([0, 20, 33, 48])
    assert relative(classifier(packed, cu_seqlens=bounds), alone) < 1e-5


def test_a_sequence_without_tokens_has_no_label() -> None:
    model, ids = SequenceClassifier(tiny_config(1), 5), tokens(2, 4)
    for inputs in (
        {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0]])},
        {"input_ids": ids[:1], "cu_seqlens": torch.tensor([0, 0, 4])},
        {"input_ids": ids[:, :0]},
    ):
        with pytest.raises(ValueError, match="a token at least in each sequence"):
            model(**inputs)
    assert not model(ids, cache=model.new_cache(2)).requires_grad


def test_token_classifier_drops_out_in_training() -> None:
    config = tiny_config(1)
    model, ids = TokenClassifier(config, 3, dropout=0.5), tokens(1, 10)
    assert not torch.equal(model.train()(ids), model(ids))
    assert torch.equal(model.eval()(ids), model(ids))


def test_router_logits_give_the_auxiliary_loss() -> None:
    model = tiny_model(0)
    logits, router = model(tokens(2, 9), return_router_logits=True)
    assert logits.shape == (2, 9, model.config.vocab_size) and len(router) == model.config.num_hidden_layers
    k = model.config.num_experts_per_tok
    loss = sum(load_balancing_loss(r, moe_route(r.detach(), k)[1]) for r in router)
    loss.backward()
    assert all(layer.block_sparse_moe.gate.weight.grad is not None for layer in model.model.layers)


def test_released_model_has_its_parameters() -> None:
    model = CausalLM(TextConfig(), device="meta", dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == 456_089_655_296
    assert [layer.lightning for layer in model.model.layers] == ([True] * 7 + [False]) * 10


def test_weights_start_at_the_initializer_range() -> None:
    model = CausalLM(tiny_config(0, hidden_size=64, initializer_range=0.05))
    for name, p in model.named_parameters():
        if p.dim() > 1:
            assert 0.04 < p.std() < 0.06, name
        else:
            assert torch.equal(p, torch.ones_like(p)), name


@torch.no_grad()
def test_flash_attn_is_called_as_it_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in of its conventions, as there is no GPU: [B, T, H, D], causal from the last key, window to the left."""

    def dense(q, k, v, causal, window_size):  # type: ignore[no-untyped-def]
        T, L = q.shape[1], k.shape[1]
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
        behind = (torch.arange(T)[:, None] + L - T) - torch.arange(L)
        seen = (behind >= 0) & ((behind <= window_size[0]) | (window_size[0] < 0))
        scores = torch.einsum("bthd,blhd->bhtl", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bhtl,blhd->bthd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, causal, window_size):  # type: ignore[no-untyped-def]
        assert (
            cu_q.dtype == torch.int32 and torch.equal(cu_q, cu_k) and max_q == max_k == int(cu_q.diff().max())
        )
        bounds = cu_q.tolist()
        parts = [
            dense(*(x[None, a:b] for x in (q, k, v)), causal, window_size)[0] for a, b in pairwise(bounds)
        ]
        return torch.cat(parts)

    flash = types.SimpleNamespace(flash_attn_func=dense, flash_attn_varlen_func=varlen)
    for window in (None, 4):
        model = tiny_model(9, sliding_window=window)
        ids, bounds = tokens(1, 23), torch.tensor([0, 9, 23])
        holes = torch.ones(1, 23)
        holes[0, 5:9] = 0
        for inputs in ({}, {"cu_seqlens": bounds}, {"attention_mask": holes}):
            expected = model(ids, **inputs)
            with monkeypatch.context() as patch:
                patch.setattr(softmax, "_flash_attn", lambda: flash)
                patch.setattr(softmax, "_takes_flash_attn", lambda q: True)
                assert relative(model(ids, **inputs), expected) < 1e-5
                cache = model.new_cache(1)
                if not inputs:
                    parts = [model(part, cache=cache) for part in ids.split([10, 1, 12], dim=1)]
                    assert relative(torch.cat(parts, 1), expected) < 1e-5


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"input_ids": tokens(1, 4).index_fill(1, torch.tensor(2), 97)},
            r"in \[0, 97\), got 97 at row 0, token 2",
        ),
        ({"input_ids": tokens(1, 4) - 200}, r"in \[0, 97\), got -"),
        ({"input_ids": tokens(4)}, r"input_ids \[B, T\]"),
        ({"input_ids": tokens(1, 4).float()}, "int64, got .* torch.float32"),
        ({}, "both or neither"),
        ({"input_ids": tokens(1, 4), "inputs_embeds": torch.zeros(1, 4, 8)}, "both or neither"),
        ({"inputs_embeds": torch.zeros(1, 4, 3)}, "inputs_embeds"),
        (
            {"input_ids": tokens(1, 4), "attention_mask": torch.ones(1, 5)},
            r"new tokens, \[1, 4\], got \[1, 5\]",
        ),
        ({"input_ids": tokens(2, 4), "cu_seqlens": torch.tensor([0, 4])}, "B = 1"),
        ({"input_ids": tokens(1, 4), "cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens"),
        (
            {
                "input_ids": tokens(1, 4),
                "cu_seqlens": torch.tensor([0, 4]),
                "attention_mask": torch.ones(1, 4),
            },
            "cu_seqlens without",
        ),
    ],
)
def test_bad_input(inputs: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        tiny_model(0)(**inputs)


def test_a_cache_of_another_batch() -> None:
    model = tiny_model(0)
    with pytest.raises(ValueError, match="cache of 2 rows, got 3"):
        model(tokens(2, 4), cache=model.new_cache(3))


def test_layers_know_their_place() -> None:
    """The decay depends on a layer's index among all layers, softmax ones too."""
    config = tiny_config(0)
    layers = CausalLM(config, device="meta").model.layers
    for i, layer in enumerate(layers):
        if config.attn_type_list[i] == LIGHTNING:
            assert layer.self_attn.layer_idx == i and layer.self_attn.num_layers == len(layers)
    assert dataclasses.replace(config).attn_type_list == config.attn_type_list
