"""Saving over an old checkpoint: what is killed, fails or is refused leaves it whole."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from checkpoint_support import CONFIG, LAYERS, write
from models_support import tiny_config, tiny_model

from models import saving
from models.checkpoint import load, save
from models.config import TextConfig
from models.shards import INDEX
from models.tensors import entries
from models.text import CausalLM


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
@pytest.mark.parametrize("step", ["save_file", "flush", "_write_json"])
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
