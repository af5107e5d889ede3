"""Which layer lies where, in how many bytes; int8 against the float model that it stands for."""

import copy
import io
from itertools import combinations_with_replacement, pairwise
from pathlib import Path

import pytest
import torch
from models_support import relative, tiny_config, tiny_model, tokens
from rich.console import Console
from test_models_vision import VL
from torch import nn

from lightning_attn import SparseMoE
from models import placement
from models import quantize as quantize_module
from models.checkpoint import load, save
from models.config import TextConfig, VLConfig
from models.placement import Plan, available, plan
from models.quantize import Int8Linear, quantize, quantize_rows
from models.tensors import entries, skeleton
from models.text import CausalLM
from models.units import _balanced
from models.vl import VLForConditionalGeneration

LAYERS = {"num_hidden_layers": 2, "attn_type_list": (0, 1)}


def text(made: Plan) -> str:
    file = io.StringIO()
    Console(file=file, width=140).print(made.table())
    return file.getvalue()


@pytest.fixture(scope="module")
def released() -> nn.Module:
    return skeleton(TextConfig(), dtype=torch.bfloat16)


# Placement


@pytest.mark.parametrize("vl", [False, True])
def test_eight_devices_as_released(released: nn.Module, vl: bool) -> None:
    model = skeleton(VLConfig(), dtype=torch.bfloat16) if vl else released
    made = plan(model, ["meta"] * 8, tokens=1_000_000, sequences=2)
    prefix = "language_model." if vl else ""
    for i, share in enumerate(made.shares):
        layers = [f"{prefix}model.layers.{10 * i + j}" for j in range(10)]
        before = {0: [f"{prefix}model.embed_tokens"]}.get(i, [])
        if vl and i == 0:
            before += ["image_newline", "vision_tower", "multi_modal_projector"]
        after = {7: [f"{prefix}model.norm", f"{prefix}lm_head"]}.get(i, [])
        assert sorted(share.units) == sorted([*before, *layers, *after])
    total = 456_437_219_328 if vl else 456_089_655_296
    assert sum(share.weights for share in made.shares) == 2 * total
    assert sum(share.states for share in made.shares) == 70 * 64 * 128 * 128 * 4 * 2
    assert sum(share.keys_values for share in made.shares) == 10 * 2 * 8 * 128 * 10**6 * 2 * 2
    shown = text(made)
    assert "layers 70-79, norm, lm_head" in shown and "40.96" not in shown and "82.0 GB" not in shown
    assert "912." in shown and "1,000,000 tokens x 2 sequences" in shown


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 9, 16, 80, 100])
def test_any_number_of_devices(released: nn.Module, n: int) -> None:
    """Every layer once and in order; no move of one layer to a neighbour makes the largest share smaller."""
    made = plan(released, ["meta"] * n, int8=True)
    units = [unit for share in made.shares for unit in share.units]
    layers = [int(unit.rpartition(".")[2]) for unit in units if "layers" in unit]
    assert layers == list(range(80)) and len(units) == 83
    assert "model.embed_tokens" in made.shares[0].units and "lm_head" in made.shares[-1].units
    layer = max(
        sum(e.nbytes(True) for x, e in entries(released).items() if f"layers.{i}." in x) for i in (0, 7)
    )
    sizes = [share.total for share in made.shares]
    mean = sum(sizes) / n
    assert max(sizes) <= mean + layer + 2 * 1_229_193_216 * 2


def test_best_of_all_ways() -> None:
    """Against every way to cut a few layers."""
    for seed in range(20):
        sizes = torch.randint(1, 20, (9,), generator=torch.Generator().manual_seed(seed)).tolist()
        for n in (1, 2, 3, 4):
            loads = []
            for cuts in combinations_with_replacement(range(8), n - 1):
                parts = [sum(sizes[1:-1][a:b]) for a, b in pairwise((0, *cuts, 7)) if a <= b]
                if len(parts) == n:
                    parts[0] += sizes[0]
                    parts[-1] += sizes[-1]
                    loads.append(max(parts))
            counts, at, got = _balanced(sizes, n), 1, []
            for count in counts:
                got.append(sum(sizes[at : at + count]))
                at += count
            got[0] += sizes[0]
            got[-1] += sizes[-1]
            assert at == 8 and max(got) == min(loads)


@torch.no_grad()
def test_same_logits_wherever_it_lies(tmp_path: Path) -> None:
    model = tiny_model(5)
    save(model, tmp_path)
    ids = tokens(2, 30)
    for options in (
        {"devices": ["cpu", "cpu"]},
        {"devices": ["cpu"] * 8},
        {"placement": {"": "cpu", "lm_head": "cpu"}},
    ):
        assert torch.equal(load(tmp_path, **options)(ids), model(ids))
    made = plan(model, ["meta", "cpu"])
    made.apply(model)
    for share, device in zip(made.shares, ("meta", "cpu"), strict=True):
        for unit in share.units:
            assert {t.device.type for t in model.get_submodule(unit).state_dict().values()} == {device}
    assert {p.device.type for p in load(tmp_path, devices="meta").parameters()} == {"meta"}


def test_vl_in_parts(tmp_path: Path) -> None:
    model = VLForConditionalGeneration(VL)
    save(model, tmp_path)
    other = load(
        tmp_path, placement={"": "cpu", "image_newline": "meta", "language_model.model.layers.1": "meta"}
    )
    assert (
        other.image_newline.is_meta and not other.vision_tower.vision_model.embeddings.class_embedding.is_meta
    )
    assert [layer.input_layernorm.weight.is_meta for layer in other.language_model.model.layers] == [
        False,
        True,
    ]
    assert torch.equal(load(tmp_path, devices=["cpu", "cpu"]).image_newline, model.image_newline)


def test_placements_of_ones_own(released: nn.Module) -> None:
    made = plan(
        released,
        placement={"": "meta", "model.layers.7": "cpu", "model.layers": "cpu", "model.layers.70": "meta"},
    )
    held = {str(share.device): share.units for share in made.shares}
    assert "model.layers.7" in held["cpu"] and "model.layers.70" in held["meta"] and "lm_head" in held["meta"]
    with pytest.raises(
        ValueError, match="placement: expected a device for every part, got none for model.embed_tok"
    ):
        plan(released, placement={"model.layers": "cpu"})
    with pytest.raises(
        ValueError, match="expected parts such as 'model.embed_tokens' or whole layers, got model.layer.3"
    ):
        plan(released, placement={"": "cpu", "model.layer.3": "meta"})
    with pytest.raises(ValueError, match="devices: expected at least one, got none"):
        plan(released, [])
    with pytest.raises(ValueError, match="devices: expected names as 'cpu', .* got 'gpu0'"):
        plan(released, ["cpu", "gpu0"])
    with pytest.raises(ValueError, match=r"expected one of the \d+ CUDA devices here, got 'cuda:99'"):
        plan(released, "cuda:99")


def test_too_little_memory(released: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which device, how much, and what to do; of a device that stands there twice, both shares."""
    assert 0 < available(torch.device("cpu")) < 10**15 and available(torch.device("meta")) is None
    save(tiny_model(0, **LAYERS), tmp_path)
    monkeypatch.setattr(
        placement, "available", lambda device: 600_000_000_000 if device.type == "cpu" else None
    )
    plan(released, ["cpu", "meta"]).check()
    plan(released, "cpu", int8=True).check()
    message = r"expected 912.2 GB on cpu \(912.2 GB of weights\), got 600.0 GB available. Give it more devices, int8=True"
    for devices in ("cpu", ["cpu", "cpu"]):
        with pytest.raises(ValueError, match=message):
            plan(released, devices).check()
    with pytest.raises(ValueError, match=r"of weights and 164.1 GB of cache"):
        plan(released, "cpu", int8=True, tokens=4_000_000, sequences=1).check()
    monkeypatch.setattr(placement, "available", lambda device: 1000)
    seen = []
    monkeypatch.setattr(Plan, "apply", lambda *args: seen.append(args))
    with pytest.raises(ValueError, match=r"placement: expected .* on cpu .* got 1.0 kB available"):
        load(tmp_path)
    assert not seen, "memory was taken"


@torch.no_grad()
def test_the_cache_is_what_the_plan_says() -> None:
    model = tiny_model(3)
    made = plan(model, "cpu", tokens=32, sequences=2)
    cache = model.new_cache(2, rollback=False)
    model(tokens(2, 32), cache=cache)
    assert sum(s.states + s.keys_values for s in made.shares) == cache.nbytes


# int8


def test_plan_and_model_agree_on_bytes() -> None:
    for model in (tiny_model(4), VLForConditionalGeneration(VL)):
        before = sum(share.weights for share in plan(model, "cpu", int8=True).shares)
        quantize(model)
        after = sum(share.weights for share in plan(model, "cpu").shares)
        held = [*model.parameters(), *(b for name, b in model.named_buffers() if not name.endswith("decay"))]
        assert before == after == sum(t.nbytes for t in held)


def test_what_is_quantised() -> None:
    """Nothing but the layers' linears and experts."""
    model = quantize(VLForConditionalGeneration(VL))
    floating = {type(m) for m in model.vision_tower.modules()} | {
        type(m) for m in model.multi_modal_projector.modules()
    }
    language = model.language_model
    assert Int8Linear not in floating and type(language.lm_head) is nn.Linear
    for layer in language.model.layers:
        assert layer.block_sparse_moe.quantized and type(layer.block_sparse_moe.gate) is nn.Linear
        linears = [m for m in layer.self_attn.modules() if isinstance(m, (nn.Linear, Int8Linear))]
        assert len(linears) >= 3 and all(isinstance(m, Int8Linear) for m in linears)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_load_is_quantise_after_load(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model(6, dtype=dtype, **LAYERS)
    save(model, tmp_path / "a")
    streamed, after = (
        load(tmp_path / "a", int8=True).state_dict(),
        quantize(load(tmp_path / "a")).state_dict(),
    )
    assert streamed.keys() == after.keys()
    assert all(t.dtype == after[n].dtype and torch.equal(t, after[n]) for n, t in streamed.items())
    assert any(t.dtype == torch.int8 for t in streamed.values())


def dequantized(model: CausalLM) -> CausalLM:
    """The float model that a quantised one stands for."""
    wide = CausalLM(model.config)
    for name, module in wide.named_modules():
        other = model.get_submodule(name)
        if isinstance(other, Int8Linear):
            module.weight.data = other.weight * other.scale[:, None]
        elif isinstance(other, SparseMoE):
            module.gate_up_proj.data = other.gate_up_proj * other.gate_up_scale[..., None]
            module.down_proj.data = other.down_proj * other.down_scale[..., None]
        else:
            for n, p in other.named_parameters(recurse=False):
                getattr(module, n).data = p.data
    return wide


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_logits_are_those_of_the_dequantised_model(seed: int) -> None:
    model = tiny_model(seed)
    exact = {n: e.view.clone() for n, e in entries(model).items()}
    ids = tokens(2, 40)
    before = model(ids)
    wide = dequantized(quantize(model))
    assert relative(model(ids), wide(ids)) < 2e-5
    for t in (1, 3):  # few rows: the other path
        assert relative(model(ids[:1, :t]), wide(ids[:1, :t])) < 2e-5
    for name, entry in entries(wide).items():
        bound = exact[name].abs().amax(-1, keepdim=True) / 254 if entry.quantizable else 0
        assert ((entry.view - exact[name]).abs() <= bound * (1 + 1e-5)).all(), name
    # A token that another expert gets is another token.
    assert 1e-4 < float((model(ids) - before).abs().median() / before.abs().max()) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rows", [0, 1, 5, 64, 65])
def test_int8_linear(dtype: torch.dtype, rows: int) -> None:
    """Both paths, odd sizes, large activations; within the rounding of the dtype of the exact product."""
    torch.manual_seed(rows)
    for K, N in ((37, 19), (64, 32), (128, 5), (1, 1)):
        linear = nn.Linear(K, N, bias=False)
        module = Int8Linear.from_linear(linear)
        x = (torch.randn(2, rows, K) * 100).to(dtype)
        y = module(x)
        exact = x.double() @ (module.weight.double() * module.scale.double()[:, None]).T
        assert y.dtype == dtype and y.shape == (2, rows, N)
        shifted = torch.empty(x.numel() + 1, dtype=dtype)[1:].view(x.shape).copy_(x)
        size = x.double().abs() @ (module.weight.double().abs() * module.scale.double()[:, None]).T
        for got in (y, module(shifted), module(x.transpose(0, 1).contiguous().transpose(0, 1))):
            assert ((got - exact).abs() <= 2 * max(torch.finfo(dtype).eps, 1e-6) * size + 1e-30).all()
        x.requires_grad_()
        module(x).sum().backward()
        assert x.grad.shape == x.shape


def test_int8_product_keeps_float32_scales() -> None:
    """PyTorch's own in bfloat16 would round them; here the sum is rounded, and its product with the scale."""
    torch.manual_seed(0)
    module = Int8Linear.from_linear(nn.Linear(128, 300, bias=False))
    x = torch.randn(8, 128, dtype=torch.bfloat16)
    sums = (x.double() @ module.weight.double().T).to(x.dtype)
    expected = (sums * module.scale).to(x.dtype)
    assert quantize_module._has_fast_product(x, module.weight)
    assert (module(x) == expected).double().mean() > 0.95


def test_rows_as_experts() -> None:
    w = torch.randn(6, 8)
    w[2] = 0
    q, scale = quantize_rows(w)
    assert q.dtype == torch.int8 and scale.dtype == torch.float32 and scale[2] == 1
    assert ((w - q * scale[:, None]).abs() <= scale[:, None] / 2 * (1 + 1e-6)).all()
    moe = SparseMoE(8, 6, 2, 1)
    whole = copy.deepcopy(moe).quantize()
    for e in range(2):
        for half, w in enumerate(moe.gate_up_proj[e].detach().split(6)):
            q, scale = quantize_rows(w)
            rows = slice(6 * half, 6 * half + 6)
            assert torch.equal(q, whole.gate_up_proj[e, rows]) and torch.equal(
                scale, whole.gate_up_scale[e, rows]
            )
    with pytest.raises(ValueError, match="without bias"):
        Int8Linear.from_linear(nn.Linear(2, 2))


def test_moving_rounds_no_scale(tmp_path: Path) -> None:
    model = quantize(tiny_model(7, **LAYERS))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for moved in (model.to(torch.bfloat16), model.to("cpu", torch.float16), model.double(), model.half()):
        after = moved.state_dict()
        for name, t in before.items():
            if t.dtype == torch.int8 or name.endswith("scale"):
                assert after[name].dtype == t.dtype and torch.equal(after[name], t), name
    meta = model.to("meta").to(torch.bfloat16)
    scales = [t for n, t in meta.state_dict().items() if n.endswith("scale")]
    assert scales and all(t.is_meta and t.dtype == torch.float32 for t in scales)
    assert all(
        t.dtype == torch.float32
        for n, t in meta.to_empty(device="cpu").state_dict().items()
        if n.endswith("scale")
    )


def test_numbers_that_cannot_be_quantised(tmp_path: Path) -> None:
    model = CausalLM(tiny_config(0, **LAYERS))
    with torch.no_grad():
        model.model.layers[1].block_sparse_moe.down_proj[1, 2, 3] = torch.nan
    save(model, tmp_path)
    with pytest.raises(
        ValueError, match=r"layers.1.block_sparse_moe.experts.1.w2.weight: expected finite numbers"
    ):
        load(tmp_path, int8=True)
