"""Where the Triton kernels do not run, and what they do not take: a reason, never a traceback and never another backend."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import BACKENDS, INTERPRETED, assert_same_bits, dtypes_of, make_inputs, plain_environment

import lightning_attn
from lightning_attn import available_backends, gated_rms_norm, lightning_attention, lightning_attention_decode
from lightning_attn.backends import supports
from lightning_attn.dispatch import Spec, resolve

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
interpreted = pytest.mark.skipif("triton" not in INTERPRETED, reason="Triton's interpreter does not run here")


def python(code: str, **environment: str) -> str:
    """What `code` prints in a fresh interpreter that sees no GPU; it must end well and warn of nothing."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    process = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        capture_output=True,
        check=False,
        text=True,
        timeout=120,
        cwd=Path(lightning_attn.__file__).resolve().parent.parent,
        env=plain_environment() | hidden | environment,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


# Calls of the command line too: each prints its exit code and all that it says on one line.
CALLS = """
import sys
import torch
from click.testing import CliRunner
import lightning_attn
from lightning_attn import decay, gated_rms_norm, lightning_attention, lightning_attention_decode

def calls(backend, T=5, K=8, dtype=torch.float32):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, T, 3, K).to(dtype) for _ in range(3))
    state = torch.zeros(2, 3, K, K)
    rates = decay.alibi(3)
    return [
        lambda: lightning_attention(q, k, v, rates, backend=backend),
        lambda: lightning_attention_decode(q, k, v, rates, state, backend=backend),
        lambda: gated_rms_norm(q, k, torch.ones(K, dtype=dtype), backend=backend),
    ]

def refusals(*args, **kwargs):
    for call in calls(*args, **kwargs):
        try:
            call()
        except ValueError as error:
            print(error)
        else:
            raise AssertionError("it ran")

def command(*arguments):
    from lightning_attn.cli import main
    result = CliRunner().invoke(main, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    print(result.exit_code, " ".join(result.output.split()))
"""
STATUS = 'print(lightning_attn.available_backends()["triton"])\n'


@needs_triton
def test_without_a_gpu_and_the_interpreter_a_named_backend_says_what_it_needs() -> None:
    """Row 25: what is said names the variable that would let it run; "auto" runs all the same."""
    code = STATUS + 'refusals("triton")\ncommand("info")\ncommand("check", "--backend", "triton")\n'
    reason, *errors, info, check = python(CALLS + code + 'for call in calls("auto"): call()').splitlines()
    assert "CUDA" in reason and "TRITON_INTERPRET=1" in reason
    functions = ("lightning_attention", "lightning_attention_decode", "gated_rms_norm")
    for error, function in zip(errors, functions, strict=True):
        assert error.startswith(f"{function}: ") and "got 'triton'" in error and reason in error
    assert info.startswith("0 ") and reason in info
    assert check.startswith("1 ") and reason in check


@needs_triton
def test_with_the_interpreter_a_named_backend_runs_on_cpu_tensors() -> None:
    """Row 25: and "auto" still takes the backend that is made for them."""
    code = """
print(lightning_attn.available_backends()["triton"])
for named, plain in zip(calls("triton"), calls("reference")):
    torch.testing.assert_close(named(), plain())
assert "lightning_attn.backends.triton" in sys.modules
"""
    assert python(CALLS + code, TRITON_INTERPRET="1").split() == ["ok"]
    code = 'for call in calls("auto"): call()\nassert "triton" not in sys.modules'
    python(CALLS + code, TRITON_INTERPRET="1")


WITHOUT_TRITON = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Absent())
"""


@pytest.mark.parametrize("environment", [{}, {"TRITON_INTERPRET": "1"}], ids=["", "interpreter"])
def test_without_triton_a_named_backend_says_so(environment: dict[str, str]) -> None:
    """Row 25: an import of the package needs none of its extras; nor does "auto"."""
    code = STATUS + 'refusals("triton")\ncommand("info")\ncommand("check", "--backend", "triton")\n'
    code = WITHOUT_TRITON + CALLS + code + 'for call in calls("auto"): call()'
    reason, *errors, info, check = python(code, **environment).splitlines()
    assert "Triton is not installed" in reason and "gpu" in reason
    assert len(errors) == 3 and all("got 'triton'" in error and reason in error for error in errors)
    assert info.startswith("0 ") and reason in info
    assert check.startswith("1 ") and reason in check


BROKEN_TRITON = WITHOUT_TRITON.replace("ModuleNotFoundError", "ImportError").replace(
    "No module named {name!r}", "libtriton does not load"
)


def test_a_triton_that_does_not_load_is_a_reason() -> None:
    """Row 25: as one that is not there."""
    reason, *errors = python(BROKEN_TRITON + CALLS + STATUS + 'refusals("triton")').splitlines()
    assert reason == "Triton does not load: libtriton does not load" and len(errors) == 3


# ---- what it does not take ------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(
    "options, says",
    [
        ({"dtype": torch.float64}, "it takes float32, bfloat16 or float16, not torch.float64"),
        ({"dtype": torch.bfloat16}, "Triton's interpreter"),
        ({"K": 257, "V": 4}, "it takes K from 1 to 256, not 257"),
        ({"K": 4, "V": 300}, "it takes V from 1 to 256, not 300"),
    ],
    ids=["float64", "bfloat16", "K", "V"],
)
def test_a_call_that_it_does_not_take_raises_with_the_reason(options: dict, says: str) -> None:
    """Rows 13 and 24: forward, backward and decode; "auto" takes another, and the state stays as it was."""
    x = make_inputs(B=1, T=2, H=1, **options)
    with pytest.raises(ValueError, match=rf"^lightning_attention: .*got 'triton' \(triton: .*{says}"):
        lightning_attention(x.q, x.k, x.v, x.decay, backend="triton")
    state = x.initial_state.clone()
    with pytest.raises(ValueError, match=rf"^lightning_attention_decode: .*got 'triton' \(triton: .*{says}"):
        lightning_attention_decode(x.q, x.k, x.v, x.decay, state, backend="triton")
    assert_same_bits(state, x.initial_state)
    assert lightning_attention(x.q, x.k, x.v, x.decay).isfinite().all()


@interpreted
def test_the_dtypes_of_the_interpreter() -> None:
    """Row 1: what the suite checks of these kernels here, neither more nor less."""
    assert dtypes_of("triton") == [torch.float32, torch.float16]


@needs_triton
def test_a_triton_that_is_too_old_is_a_reason() -> None:
    """Row 25: before anything of it is used."""
    old = "import sys, types\nsys.modules['triton'] = types.SimpleNamespace(__version__='3.2.0')\n"
    assert python(old + CALLS + STATUS).strip() == "it needs Triton 3.6 or later, not 3.2.0"


@interpreted
def test_a_norm_that_it_does_not_take_raises_with_the_reason() -> None:
    """Rows 13 and 24: rows that are too long, and float64."""
    for x, says in (
        (torch.ones(2, 16385), "at most 16384, not 16385"),
        (torch.ones(2, 4).double(), "float64"),
    ):
        with pytest.raises(ValueError, match=rf"^gated_rms_norm: .*got 'triton' \(triton: .*{says}"):
            gated_rms_norm(x, x, x[0], backend="triton")
        assert gated_rms_norm(x, x, x[0]).isfinite().all()


@pytest.mark.skipif(available_backends()["triton"] != "ok", reason="the triton backend does not run here")
@pytest.mark.parametrize(
    "op, dtype, K, V, chosen",
    [
        ("attention_forward", torch.float32, 256, 1, "triton"),
        ("attention_backward", torch.float16, 1, 256, "triton"),
        (
            "attention_decode",
            torch.float32,
            128,
            128,
            "cuda" if "cuda" in BACKENDS and "cuda" not in INTERPRETED else "triton",
        ),
        ("gated_rms_norm_forward", torch.float32, 16384, 16384, "triton"),
        ("attention_forward", torch.float64, 64, 64, "reference"),
        ("attention_backward", torch.float32, 257, 64, "reference"),
        ("attention_decode", torch.float32, 64, 257, "reference"),
        ("gated_rms_norm_backward", torch.float32, 16385, 16385, "reference"),
    ],
)
def test_auto_on_a_gpu(op: str, dtype: torch.dtype, K: int, V: int, chosen: str) -> None:
    """Row 24: kernels where they can, else the reference. A decision over plain data, so no GPU is needed."""
    assert resolve("auto", Spec(op, "cuda", dtype, torch.float32, K, V), supports) == chosen
