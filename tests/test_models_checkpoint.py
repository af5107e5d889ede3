"""Checkpoints: the same bytes and logits through every form, all that can be wrong by name, and what is killed while saving."""

import json
import os
import re
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from models_support import randomize, relative, tiny_config, tiny_model, tokens, turn_half
from safetensors.torch import load_file, save_file
from test_models_vision import VL

from models import saving
from models.checkpoint import load, save
from models.config import TextConfig
from models.heads import SequenceClassifier, TokenClassifier
from models.shards import INDEX, SINGLE
from models.tensors import entries
from models.text import CausalLM
from models.vl import VLForConditionalGeneration

Tensors = dict[str, torch.Tensor]
LAYERS = {"num_hidden_layers": 2, "attn_type_list": (0, 1)}


def stored(directory: Path) -> Tensors:
    return {n: t for file in sorted(directory.glob("*.safetensors")) for n, t in load_file(file).items()}


def write(directory: Path, tensors: Tensors, config: TextConfig) -> Path:
    """A checkpoint as someone else may have it, in one file."""
    directory.mkdir(exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, directory / SINGLE, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config.to_dict()))
    return directory


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(
        t.dtype == b[n].dtype and torch.equal(t.view(torch.uint8), b[n].view(torch.uint8))
        for n, t in a.items()
    )


def released(config: TextConfig) -> Tensors:
    """Tensors by the released names, written out; each its own numbers."""
    D, F, H = config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim
    G = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (D,)}
    shapes |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (config.vocab_size, D))
    for i, kind in enumerate(config.attn_type_list):
        p = f"model.layers.{i}."
        shapes |= {f"{p}input_layernorm.weight": (D,), f"{p}post_attention_layernorm.weight": (D,)}
        if kind == 0:
            of = {"qkv_proj": (3 * H, D), "output_gate": (H, D), "norm": (H,), "out_proj": (D, H)}
        else:
            of = {"q_proj": (H, D), "k_proj": (G, D), "v_proj": (G, D), "o_proj": (D, H)}
        shapes |= {f"{p}self_attn.{name}.weight": shape for name, shape in of.items()}
        shapes[f"{p}block_sparse_moe.gate.weight"] = (config.num_local_experts, D)
        for e in range(config.num_local_experts):
            of = {"w1": (F, D), "w2": (D, F), "w3": (F, D)}
            shapes |= {f"{p}block_sparse_moe.experts.{e}.{n}.weight": s for n, s in of.items()}
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(s, generator=generator) * 0.15 for n, s in shapes.items()}


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


CONFIG = tiny_config(1, **LAYERS, hidden_size=24)
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


# Saving over an old checkpoint


def numbered(config: TextConfig, value: float) -> CausalLM:
    model = CausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)
    return model


def values(directory: Path) -> set[float]:
    return {v for e in entries(load(directory)).values() for v in e.view.flatten().unique().tolist()}


STEPS = ("replace", "unlink", "fsync")


def saved_in_child(model: CausalLM, directory: Path, step: str, kill_at: int) -> bool:
    """Saves in a process that is killed before its call number kill_at of os.`step`; whether it lived to the end."""
    if (pid := os.fork()) == 0:
        owner, name = (Path, "unlink") if step == "unlink" else (os, step)
        real, calls = getattr(owner, name), 0

        def counted(*args, **options):
            nonlocal calls
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        setattr(owner, name, counted)
        try:
            save(model, directory, max_shard_size=30_000)
        finally:
            os._exit(calls < kill_at and os.EX_OK)
    return os.WIFEXITED(os.waitpid(pid, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("single", [False, True])
def test_killed_while_saving(tmp_path: Path, step: str, single: bool) -> None:
    """At every step: the old checkpoint or the new one, never both, never neither."""
    config = tiny_config(1, **LAYERS, vocab_size=20)
    old, new = numbered(config, 1.0), numbered(config, 2.0)
    seen = []
    for at in range(1, 100):
        shutil.rmtree(tmp_path)
        if single:
            write(tmp_path, {n: e.view.clone() for n, e in entries(old).items()}, config)
        else:
            save(old, tmp_path, max_shard_size=30_000)
        lived = saved_in_child(new, tmp_path, step, at)
        found = values(tmp_path)
        assert found in ({1.0}, {2.0}), (at, found)
        seen.append(found == {2.0})
        if lived:
            break
    assert lived and seen[-1] and seen == sorted(seen), seen
    assert at > 3 or step == "unlink"
    save(new, tmp_path, max_shard_size=30_000)
    assert values(tmp_path) == {2.0} and not list(tmp_path.glob("*.incomplete"))


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("step", ["save_file", "_flush", "_write_json"])
def test_failed_saving_leaves_nothing(tmp_path: Path, monkeypatch, step: str, fresh: bool) -> None:
    config = tiny_config(1, **LAYERS)
    if not fresh:
        save(numbered(config, 1.0), tmp_path, max_shard_size=30_000)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    real, left = getattr(saving, step), [2]

    def full(*args, **options):
        left[0] -= 1
        if not left[0]:
            raise OSError("No space left on device")
        return real(*args, **options)

    if not fresh and step == "_write_json":
        left = [1]  # config.json stays
    monkeypatch.setattr(saving, step, full)
    with pytest.raises(OSError, match="No space left"):
        save(numbered(config, 2.0), tmp_path, max_shard_size=30_000)
    after = {p: p.read_bytes() for p in tmp_path.iterdir() if not (fresh and p.name == "config.json")}
    assert after == before


def test_replacing(tmp_path: Path) -> None:
    """Files of the old checkpoint go, others stay, config.json as it was; not the checkpoint of another network."""
    config = tiny_config(1, **LAYERS)
    save(numbered(config, 1.0), tmp_path, max_shard_size=30_000)
    fields = {**json.loads((tmp_path / "config.json").read_text()), "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "tokenizer.json").write_text("{}")
    for value in (2.0, 3.0):
        save(numbered(config, value), tmp_path)
        assert values(tmp_path) == {value}
        assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert (
        json.loads((tmp_path / "config.json").read_text()) == fields
        and (tmp_path / "tokenizer.json").exists()
    )
    with pytest.raises(ValueError, match="whose config.json says another: save elsewhere"):
        save(tiny_model(2), tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["x"] = "tokenizer.json"
    (tmp_path / INDEX).write_text(json.dumps(index))
    save(numbered(config, 4.0), tmp_path)
    assert values(tmp_path) == {4.0} and (tmp_path / "tokenizer.json").exists()


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="expected a model with values, got model.embed_tokens.weight on the meta"
    ):
        save(CausalLM(CONFIG, device="meta"), tmp_path)
    save(CausalLM(CONFIG), tmp_path)
    with pytest.raises(ValueError, match="save: expected a floating model, got int8"):
        save(load(tmp_path, int8=True), tmp_path / "b")
    with pytest.raises(TypeError, match="save: expected a model with a config"):
        save(torch.nn.Linear(2, 2), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_nothing_is_read_by_pickle() -> None:
    """Nowhere in the package."""
    for file in (Path(saving.__file__).parent).glob("*.py"):
        assert not re.search(r"torch\.load|import pickle", file.read_text()), file
