"""The counts and names of the released models, as the command prints them."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from models_support import tiny_config

from models.describe import main
from models.tensors import entries, skeleton

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str) -> str:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert not result.stderr
    return result.stdout


def rows(output: str) -> dict[str, list[str]]:
    cells = [[c.strip() for c in line.strip("│").split("│")] for line in output.splitlines() if "│" in line]
    return {row[0]: row[1:] for row in cells}


TEXT = {
    "embeddings, head": ["2", "1,229,193,216", "2,458,386,432", "4.9 GB", "4.9 GB"],
    "lightning attention": ["70", "251,666,432", "17,616,650,240", "35.2 GB", "17.6 GB"],
    "softmax attention": ["10", "113,246,208", "1,132,462,080", "2.3 GB", "1.1 GB"],
    "experts": ["2,560", "169,869,312", "434,865,438,720", "869.7 GB", "435.1 GB"],
    "routers": ["80", "196,608", "15,728,640", "31.5 MB", "31.5 MB"],
    "norms": ["161", "6,144", "989,184", "2.0 MB", "2.0 MB"],
}
VISION = {
    "image_newline": ["1", "6,144", "6,144", "12.3 kB", "12.3 kB"],
    "vision tower": ["1", "303,505,408", "303,505,408", "607.0 MB", "607.0 MB"],
    "projector": ["1", "44,052,480", "44,052,480", "88.1 MB", "88.1 MB"],
}


@pytest.mark.parametrize(
    "model, expected, total",
    [("text-01", TEXT, "456,089,655,296"), ("vl-01", TEXT | VISION, "456,437,219,328")],
)
def test_table(model: str, expected: dict[str, list[str]], total: str) -> None:
    output = run(model)
    found = rows(output)
    assert found.pop("total")[2] == total
    assert found == expected
    for count in ("45,944,920,064", "47,174,113,280", "48,403,306,496"):
        assert count in output


def names(layers: int = 80, experts: int = 32) -> dict[str, list[int]]:
    """The released tensors, written out."""
    D, F, V, H, G = 6144, 9216, 200064, 8192, 1024
    found = {"model.embed_tokens.weight": [V, D], "lm_head.weight": [V, D], "model.norm.weight": [D]}
    for i in range(layers):
        p = f"model.layers.{i}"
        shapes = {
            "input_layernorm": [D],
            "post_attention_layernorm": [D],
            "block_sparse_moe.gate": [experts, D],
        }
        if i % 8 == 7:
            of = {"q_proj": [H, D], "k_proj": [G, D], "v_proj": [G, D], "o_proj": [D, H]}
        else:
            of = {"qkv_proj": [3 * H, D], "output_gate": [H, D], "norm": [H], "out_proj": [D, H]}
        shapes |= {f"self_attn.{name}": shape for name, shape in of.items()}
        for e in range(experts):
            q = f"block_sparse_moe.experts.{e}"
            shapes |= {f"{q}.w1": [F, D], f"{q}.w2": [D, F], f"{q}.w3": [F, D]}
        found |= {f"{p}.{name}.weight": shape for name, shape in shapes.items()}
    return found


def listed(output: str) -> dict[str, list[int]]:
    lines = [line.split("\t") for line in output.removesuffix("\n").split("\n")]
    assert all(dtype == "BF16" for _, _, dtype in lines)
    found = {name: json.loads(shape) for name, shape, _ in lines}
    assert len(found) == len(lines)
    return found


def test_tensors() -> None:
    text = listed(run("text-01", "--tensors"))
    assert len(text) == 8243 and text == names()
    vl = listed(run("vl-01", "--tensors"))
    assert len(vl) == 8637
    assert {n: s for n, s in vl.items() if n.startswith("language_model.")} == {
        f"language_model.{n}": s for n, s in text.items()
    }
    vision = {n: s for n, s in vl.items() if n.startswith("vision_tower.")}
    assert sum(math.prod(s) for s in vision.values()) == 303_505_408 and not any(
        "post_layernorm" in n for n in vision
    )
    embeddings = "vision_tower.vision_model.embeddings"
    assert vl[f"{embeddings}.class_embedding"] == [1024] and vl["image_newline"] == [6144]
    assert vl[f"{embeddings}.patch_embedding.weight"] == [1024, 3, 14, 14]
    assert vl[f"{embeddings}.position_embedding.weight"] == [577, 1024]
    assert vl["vision_tower.vision_model.pre_layrnorm.bias"] == [1024]
    assert vl["multi_modal_projector.linear_1.weight"] == [6144, 1024]


def test_config_files(tmp_path: Path) -> None:
    config = tiny_config(3)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    expected = {n: list(e.shape) for n, e in entries(skeleton(config)).items()}
    for path in (tmp_path, tmp_path / "config.json"):
        assert listed(run(str(path), "--tensors")) == expected
        total = sum(math.prod(s) for s in expected.values())
        assert f"{total:,}" in run(str(path))
    result = CliRunner().invoke(main, ["text-02"])
    assert result.exit_code == 1 and "MODEL: expected text-01, vl-01, or a config.json" in result.output
    (tmp_path / "config.json").write_text('{"hidden_size": "x"}')
    result = CliRunner().invoke(main, [str(tmp_path)])
    assert result.exit_code == 1 and "Error: config: expected hidden_size" in result.output


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a shell")
def test_as_a_command() -> None:
    """In little memory; a pipe that closes early is no traceback."""
    peak = "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    code = "import atexit, resource, sys; sys.argv = ['describe', 'vl-01', '--tensors']; "
    code += f"atexit.register(lambda: {peak}); from models.describe import main; main()"
    command = f'{sys.executable} -c "{code}" | head -n 2'
    done = subprocess.run(
        command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.count("\n") == 2 and "Traceback" not in done.stderr and "Exception" not in done.stderr
    kilobytes = int(re.findall(r"\d+", done.stderr)[-1])
    assert kilobytes < 1 << 20
