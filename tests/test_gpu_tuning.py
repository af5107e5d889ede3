"""What the tuner may choose and what the tables say, for the head dims of models, on this device (rows 22 and 24)."""

import os
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from gpu_support import DEVICE, size
from support import BACKENDS, HALF, check, dtype_id, dtypes_of, make_inputs, run

pytestmark = pytest.mark.gpu
pytest.importorskip("triton", reason="Triton is not installed")
if "triton" not in BACKENDS:
    pytest.skip("there is neither a GPU nor Triton's interpreter", allow_module_level=True)

from triton.runtime.errors import OutOfResources
from triton_support import in_segments

from lightning_attn.backends.triton import autotune, config
from lightning_attn.backends.triton.autotune import Kernel
from lightning_attn.backends.triton.config import Tiles

HALF_DTYPE = next(dtype for dtype in HALF if dtype in dtypes_of("triton"))


def neighbours(kernel: Kernel) -> list[Tiles]:
    """Of what the tuner chooses from, the configured tiles and those that differ in one number: any number is tried,
    and the device compiles all of them in time."""
    options = autotune.candidates(kernel)
    usual = astuple(options[0])
    return [x for x in options if sum(a != b for a, b in zip(astuple(x), usual, strict=True)) <= 1]


@pytest.mark.parametrize(
    ("name", "dim"),
    [("chunk", 128), ("chunk_state", 128), ("chunk_backward", 64), ("chunk_backward_split", 128)],
)
def test_what_the_tuner_may_choose_obeys_the_rule(
    name: str, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 22: the truth itself, not only what the configured tiles give; in segments, with states."""
    monkeypatch.setattr(config, "segments", in_segments(3))
    T, H = size((520, 3), (130, 1))
    x = make_inputs(B=1, T=T, H=H, K=dim, V=dim, dtype=HALF_DTYPE, scale=dim**-0.5, rates=(0.03, 0.0, 0.4))
    kernel = Kernel(getattr(config, name), dim, dim, HALF_DTYPE, config.device_arch(torch.device(DEVICE)))
    if kernel.configured(*kernel_arguments(kernel)) is None:
        pytest.skip(f"{name} is not for this architecture")
    options = neighbours(kernel)
    assert len(options) > 1
    ran = []
    for tiles in options:
        monkeypatch.setattr(config, name, lambda *arguments, tiles=tiles: tiles)
        try:
            result = run(x, "triton")
        except OutOfResources:
            continue  # the tuner leaves it out as well
        check(result, x)
        ran.append(tiles)
    assert options[0] in ran and len(ran) > 1


def kernel_arguments(kernel: Kernel) -> tuple[int, int, torch.dtype, config.Arch]:
    return kernel.K, kernel.V, kernel.dtype, kernel.arch


TUNED_CALL = """
import sys, torch
sys.path.insert(0, {tests!r})
from support import assert_same_bits, check, make_inputs, run
from lightning_attn.backends.triton import autotune
x = make_inputs(B=2, T=90, H=2, K={dim}, V={dim}, dtype=torch.{dtype}, scale={dim} ** -0.5)
candidates = autotune.candidates
autotune.candidates = lambda kernel: candidates(kernel)[:3]  # trials take time
searched = []
search = autotune.search
autotune.search = lambda *arguments: searched.append(arguments[0].name) or search(*arguments)
first = run(x, "triton")
check(first, x)
count = len(searched)
for name, y in run(x, "triton").items():
    assert_same_bits(y, first[name], name)
assert len(searched) == count, "tuned again"
print(*searched)
"""


def test_a_tuned_call_is_the_same_in_the_next_process(tmp_path: Path) -> None:
    """Row 22: with an empty cache the first call tunes, obeys the rule and equals the second; a process that comes
    later finds what was tuned."""
    code = TUNED_CALL.format(tests=str(Path(__file__).parent), dim=size(64, 16), dtype=dtype_id(HALF_DTYPE))
    environment = {
        **os.environ, "LIGHTNING_ATTN_AUTOTUNE": "1", "LIGHTNING_ATTN_CACHE_DIR": str(tmp_path)
    }  # fmt: skip
    outputs = []
    for _ in range(2):
        process = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env=environment,
        )
        assert process.returncode == 0, process.stderr
        outputs.append(process.stdout.split())
    assert "chunk" in outputs[0] and outputs[1] == []


SHAPES = [
    (33, 33, torch.bfloat16),
    (64, 128, torch.bfloat16),
    (96, 96, torch.bfloat16),
    (160, 160, torch.bfloat16),
    (128, 128, torch.float16),
    (256, 256, torch.float16),
    (96, 96, torch.float32),
    (160, 160, torch.float32),
]
FEW = [(33, 33, torch.float16), (64, 128, torch.float32)]


@pytest.mark.parametrize(("K", "V", "dtype"), size(SHAPES, FEW), ids=dtype_id)
def test_the_tables_fit_this_device(K: int, V: int, dtype: torch.dtype, monkeypatch) -> None:
    """Row 24: every class of head dims, in segments, so that each kernel of a forward and a backward is launched; the
    others are in test_head_dims.py. What takes too much shared memory would raise."""
    monkeypatch.setattr(config, "segments", in_segments(2))
    x = make_inputs(B=1, T=size(130, 70), H=size(3, 1), K=K, V=V, dtype=dtype, scale=K**-0.5)
    check(run(x, "triton"), x)


def test_the_shapes_are_those_of_the_tables() -> None:
    """Row 24: every size class of the tables of tiles is among them, in 16 bits and in 32."""
    classes = {
        (dtype.itemsize, max(64, config.power_of_two(K), config.power_of_two(V))) for K, V, dtype in SHAPES
    }
    assert classes >= {(2, 64), (2, 128), (2, 256), (4, 128), (4, 256)}
