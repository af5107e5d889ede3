"""Checkpoints: the same bytes and logits through every form, all that can be wrong by name, and the memory it takes."""

import json
import os
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoint_support import CONFIG, LAYERS, Tensors, released, same, stored, write
from models_support import randomize, relative, tiny_config, tiny_model, tokens, turn_half
from safetensors.torch import load_file, save_file
from test_models_vision import VL

from models import saving
from models.checkpoint import load, save
from models.heads import SequenceClassifier, TokenClassifier
from models.shards import INDEX
from models.tensors import entries
from models.text import CausalLM
from models.vl import VLForConditionalGeneration


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [1, 20_000, 10**9])
def test_round_trip_keeps_every_byte(tmp_path: Path, limit: int, dtype: torch.dtype) -> None:
    config = tiny_config(1, **LAYERS)
    tensors = {name: t.to(dtype) for name, t in released(config).items()}
    model = load(write(tmp_path / "a", tensors, config))
    assert not model.training and all(p.dtype == dtype and p.requires_grad for p in model.parameters())
    save(model, tmp_path / "b", max_shard_size=limit)
    assert same(stored(tmp_path / "b"), tensors)
    files = {p.name for p in (tmp_path / "b").iterdir()}
    n = len(files) - 2
    for file in (tmp_path / "b").glob("*.safetensors"):
        held = load_file(file).values()
        assert sum(t.nbytes for t in held) <= limit or len(held) == 1
    assert n == {1: len(tensors), 10**9: 1}.get(limit, n) and (limit != 20_000 or 1 < n < len(tensors))
    assert files == {
        "config.json",
        INDEX,
        *(f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)),
    }
    index = json.loads((tmp_path / "b" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert same(dict(load(tmp_path / "b").state_dict()), dict(model.state_dict()))


def test_experts_lie_where_they_belong(tmp_path: Path) -> None:
    config = tiny_config(1, **LAYERS)
    tensors = released(config)
    model = load(write(tmp_path, tensors, config))
    for i, layer in enumerate(model.model.layers):
        for e in range(config.num_local_experts):
            w1, w2, w3 = (
                tensors[f"model.layers.{i}.block_sparse_moe.experts.{e}.w{n}.weight"] for n in (1, 2, 3)
            )
            moe = layer.block_sparse_moe
            assert torch.equal(moe.gate_up_proj[e], torch.cat([w1, w3])) and torch.equal(moe.down_proj[e], w2)


def test_decay_is_right_after_loading(tmp_path: Path) -> None:
    """It is in no file; float32 whatever the dtype, and placed with its layer."""
    model = tiny_model(3)
    save(model, tmp_path)
    for options in ({}, {"dtype": torch.bfloat16}, {"int8": True}, {"devices": ["cpu", "cpu"]}):
        for ours, other in zip(model.model.layers, load(tmp_path, **options).model.layers, strict=True):
            if ours.lightning:
                assert torch.equal(ours.self_attn.decay, other.self_attn.decay)


def test_dtypes(tmp_path: Path) -> None:
    """As most numbers are stored, or as asked for; always rounded once."""
    model = tiny_model(2, **LAYERS)
    tensors = {n: e.view.to(torch.bfloat16) for n, e in entries(model).items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].double()
    write(tmp_path, tensors, model.config)
    assert {p.dtype for p in load(tmp_path).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load(tmp_path, dtype=torch.float64).parameters()} == {torch.float64}
    with pytest.raises(TypeError, match=r"load: expected a floating dtype, got torch.int8"):
        load(tmp_path, dtype=torch.int8)
    tensors["lm_head.weight"][3, 4] = 1e5
    write(tmp_path, tensors, model.config)
    with pytest.raises(ValueError, match="lm_head.weight: expected numbers below 65504 for float16"):
        load(tmp_path, dtype=torch.float16)


def test_vl_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VLForConditionalGeneration(VL)
    save(model, tmp_path, max_shard_size=50_000)
    other = load(tmp_path)
    assert isinstance(other, VLForConditionalGeneration) and other.config == VL
    assert same(dict(model.state_dict()), dict(other.state_dict()))
    names = set(stored(tmp_path))
    assert {"image_newline", "multi_modal_projector.linear_2.bias", "language_model.lm_head.weight"} <= names
    assert "vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight" in names
    assert "language_model.model.layers.1.block_sparse_moe.experts.1.w3.weight" in names


# transformers


@pytest.mark.parametrize("seed", [0, 4])
@torch.no_grad()
def test_from_transformers(tmp_path: Path, seed: int) -> None:
    """What save_pretrained wrote, and the names in memory."""
    transformers = pytest.importorskip("transformers")
    config = tiny_config(seed)
    theirs = transformers.MiniMaxForCausalLM(transformers.MiniMaxConfig(**config.to_transformers())).eval()
    randomize(theirs, seed)
    theirs.save_pretrained(tmp_path / "a", max_shard_size="50KB")
    assert any("slope_rate" in name for name in stored(tmp_path / "a"))
    write(tmp_path / "b", theirs.state_dict(), config)
    turn_half(theirs, config)
    ids = tokens(2, 40)
    expected = theirs(ids, use_cache=False).logits
    for name in "ab":
        model = load(tmp_path / name)
        assert relative(model(ids), expected) < 1e-5
        assert model.config.rotary_dim == config.head_dim // 2


@torch.no_grad()
def test_into_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = tiny_model(4)
    save(model, tmp_path, max_shard_size=50_000)
    config = transformers.MiniMaxConfig(**model.config.to_transformers())
    theirs, info = transformers.MiniMaxForCausalLM.from_pretrained(
        tmp_path, config=config, dtype=torch.float32, output_loading_info=True
    )
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert all(re.search("slope_rate|_decay", name) for name in info["missing_keys"])
    turn_half(theirs.eval(), model.config)
    ids = tokens(2, 40)
    assert relative(model(ids), theirs(ids, use_cache=False).logits) < 1e-5


def test_heads(tmp_path: Path) -> None:
    """Another head's tensors are left, a head that is not there is drawn, one that is there is read."""
    model = tiny_model(0, **LAYERS)
    save(model, tmp_path / "a")
    head = partial(SequenceClassifier, num_labels=3)
    with pytest.warns(UserWarning, match="no score.weight: drawn anew"):
        classifier = load(tmp_path / "a", head=head)
    assert 0 < classifier.score.weight.std() < 0.1
    assert same(dict(classifier.model.state_dict()), dict(model.model.state_dict()))
    save(classifier, tmp_path / "b")
    assert same(dict(load(tmp_path / "b", head=head).state_dict()), dict(classifier.state_dict()))
    with pytest.raises(ValueError, match=r"score.bias: expected \[3\], got no such tensor"):
        load(tmp_path / "b", head=partial(TokenClassifier, num_labels=3))
    with pytest.raises(ValueError, match="score.weight: expected no such tensor"):
        load(tmp_path / "b")


# What is wrong


NORM, W3 = "model.norm.weight", "model.layers.1.block_sparse_moe.experts.2.w3.weight"
GATE = "model.layers.1.block_sparse_moe.gate.weight"


def without(t: Tensors) -> None:
    del t[W3]


def fused_too(t: Tensors) -> None:
    t["model.layers.1.mlp.experts.down_proj"] = torch.zeros(
        CONFIG.num_local_experts, 24, CONFIG.intermediate_size
    )


def other_decay(t: Tensors) -> None:
    t["model.layers.0.self_attn.slope_rate"] = torch.full((CONFIG.num_attention_heads, 1, 1), 0.3)


@pytest.mark.parametrize(
    "change, message",
    [
        (without, rf"{W3}: expected \[{CONFIG.intermediate_size}, 24\], got no such tensor"),
        (lambda t: t.update(extra=torch.zeros(3)), r"extra: expected no such tensor, got \[3\] F32 in model.safet"),
        (lambda t: t.update({NORM: torch.zeros(23)}), rf"{NORM}: expected shape \[24\], got \[23\] F32 in model"),
        (lambda t: t.update({W3: t[W3].T}), rf"{W3}: expected shape \[{CONFIG.intermediate_size}, 24\], got \[24, "),
        (lambda t: t.update({NORM: torch.zeros(24, dtype=torch.int8)}), f"{NORM}: expected dtype BF16, .*got .* I8 in"),
        (lambda t: t.update({NORM: torch.zeros(24, dtype=torch.int64)}), f"{NORM}: expected dtype BF16, .* I64 in"),
        (lambda t: t.update({NORM: t[NORM].to(torch.float8_e4m3fn)}), f"{NORM}: expected dtype BF16, .* F8_E4M3 in"),
        (fused_too, "experts.0.w2.weight: expected it once, got .*experts.0.w2.weight and .*mlp.experts.down_proj"),
        (lambda t: t.update({GATE.replace("block_sparse_moe", "mlp"): t[GATE] + 1}), f"{GATE}: expected it once, got"),
        (other_decay, "layers.0.self_attn.slope_rate: expected the decay of LightningAttention"),
    ],
)  # fmt: skip
def test_wrong_tensors(tmp_path: Path, change, message: str) -> None:
    tensors = released(CONFIG)
    change(tensors)
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path, tensors, CONFIG))


def test_all_problems_at_once_but_not_thousands(tmp_path: Path) -> None:
    tensors = released(CONFIG)
    del tensors[W3]
    tensors |= {NORM: torch.zeros(3), "a": torch.zeros(1)}
    with pytest.raises(ValueError, match="got 3 problems") as error:
        load(write(tmp_path, tensors, CONFIG))
    assert all(f"{name}: expected" in str(error.value) for name in (W3, NORM, "a"))
    other = tiny_config(1, **LAYERS, hidden_size=40)
    with pytest.raises(ValueError, match=r"and \d+ more$") as error:
        load(write(tmp_path, tensors, other))
    assert str(error.value).count("\n") == 21


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save(tiny_model(1, **LAYERS), tmp_path, max_shard_size=30_000)
    return tmp_path


def reindex(directory: Path, **changes: str) -> None:
    """Changes an index: weight_map entries, by tensors' names with _ for every dot."""
    file = directory / INDEX
    index = json.loads(file.read_text())
    for name in list(index["weight_map"]):
        if (short := name.replace(".", "_")) in changes:
            index["weight_map"][name] = changes[short]
    file.write_text(json.dumps(index))


def first(directory: Path) -> Path:
    return min(directory.glob("model-*.safetensors"))


def truncate(directory: Path) -> None:
    data = first(directory).read_bytes()
    first(directory).write_bytes(data[:-100])


def repeat(directory: Path) -> None:
    last = max(directory.glob("model-*.safetensors"))
    save_file({**load_file(last), "model.embed_tokens.weight": torch.zeros(1)}, last)


def unindexed(directory: Path) -> None:
    save_file({**load_file(first(directory)), "stray": torch.zeros(1)}, first(directory))


@pytest.mark.parametrize(
    "change, message",
    [
        (truncate, "model-00001-of-.*: expected a safetensors file, got one that is truncated or corrupt .*fetch it"),
        (lambda d: first(d).write_bytes(b""), "model-00001-of-.*: expected a safetensors file"),
        (lambda d: first(d).write_bytes(os.urandom(5000)), "model-00001-of-.*: expected a safetensors file"),
        (lambda d: first(d).unlink(), "model-00001-of-.*: expected it beside .*index.json, got no such file"),
        (lambda d: reindex(d, lm_head_weight="model-00001-of-00002.safetensors"), "expected it beside"),
        (lambda d: reindex(d, lm_head_weight=first(d).name), "lm_head.weight: expected it in model-00001-of-.*, as"),
        (lambda d: reindex(d, lm_head_weight="../x.safetensors"), r"files beside it, got '\.\./x.safetensors'"),
        (lambda d: reindex(d, lm_head_weight="/etc/x.safetensors"), "files beside it, got '/etc/x.safetensors'"),
        (lambda d: reindex(d, lm_head_weight="..\\\\x.safetensors"), "files beside it, got"),
        (lambda d: reindex(d, lm_head_weight="model.bin"), "names of .safetensors files beside it, got 'model.bin'"),
        (repeat, "model.embed_tokens.weight: expected it once, got it in model-00001-of-.* and in model-"),
        (unindexed, "stray: expected it in model.safetensors.index.json, got it only in model-00001"),
        (lambda d: (d / INDEX).unlink(), r"expected .*index.json with its shards .* got \d+ file\(s\) without an index"),
        (lambda d: (d / INDEX).write_text("{"), "index.json: expected JSON, got"),
        (lambda d: (d / INDEX).write_text('{"weight_map": [1]}'), "index.json: expected a weight_map of names and"),
        (lambda d: (d / "config.json").unlink(), "config: expected a config.json, got"),
    ],
)  # fmt: skip
def test_wrong_files(sharded: Path, change, message: str) -> None:
    assert load(sharded)
    change(sharded)
    with pytest.raises(ValueError, match=message):
        load(sharded)


def test_wrong_directories(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a directory, got .*nowhere, which is none"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="got neither"):
        load(tmp_path)
    for name in ("pytorch_model.bin", "a.pt", "b.pth"):
        (tmp_path / name).write_bytes(b"\x80\x04.")
        with pytest.raises(ValueError, match=rf"got pickles \({name}.*run whatever code.*safetensors"):
            load(tmp_path)
        (tmp_path / name).unlink()


# Memory


def test_memory_of_loading_and_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the model: about a tensor, not a second model, though one file holds all of it."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not os.access(reset, os.W_OK):
        pytest.skip("the peak cannot be reset here")

    def resident(name: str) -> int:
        return int(re.search(rf"{name}:\s*(\d+) kB", status.read_text())[1]) * 1024

    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_local_experts": 8, **LAYERS}
    config = tiny_config(0, **sizes, num_attention_heads=4, num_key_value_heads=4, head_dim=32, rotary_dim=16)
    model = CausalLM(config)
    total = sum(p.nbytes for p in model.parameters())
    assert total > 90 << 20

    def extra(function, *args, **options) -> tuple[int, object]:
        reset.write_text("5")
        before = resident("VmRSS")
        result = function(*args, **options)
        return resident("VmHWM") - before, result

    assert extra(save, model, tmp_path)[0] < 16 << 20
    monkeypatch.setattr("models.shards._MAPPED", 1 << 20)  # else all of this small file is mapped at once
    grown, loaded = extra(load, tmp_path)
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))
    assert grown < total + (16 << 20)


def test_nothing_is_read_by_pickle() -> None:
    """Nowhere in the package."""
    for file in (Path(saving.__file__).parent).glob("*.py"):
        assert not re.search(r"torch\.load|import pickle", file.read_text()), file
