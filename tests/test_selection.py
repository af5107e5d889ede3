"""Which tests `pytest -m gpu` selects: here, and on a machine with a GPU, which is pretended for the collection."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import plain_environment

TESTS = Path(__file__).parent

# A plugin of pytest's: a few facts of a device; whatever would start CUDA fails. It writes down what was collected.
PLUGIN = """
import json
import os
import types
import torch

def no_device(*args, **kwargs):
    raise AssertionError("the collection started CUDA")

if os.environ["PRETEND"] == "1":
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda._lazy_init = no_device
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_properties = lambda device=None: types.SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, name="pretended", total_memory=1 << 37
    )
    from lightning_attn.backends import cuda
    cuda.unavailable = lambda: None  # as if CuPy were there

def described(item):
    conftest = next(p for p in item.config.pluginmanager.get_plugins() if getattr(p, "_op", None))
    parameters = getattr(item, "callspec", None) and item.callspec.params or {}
    return {
        "file": item.path.name,
        "test": item.originalname,
        "backend": str(parameters.get("variant", parameters.get("backend"))),
        "dtype": str(parameters.get("dtype")).removeprefix("torch."),
        "op": conftest._op(item),
    }

left_out = []

def pytest_deselected(items):
    left_out.extend(map(described, items))

def pytest_collection_finish(session):
    import support
    names = ("BACKENDS", "HERE", "ON_CPU", "INTERPRETED", "COMPILED", "ABSENT")
    report = {
        "lists": {name: getattr(support, name) for name in names},
        "selected": [described(item) for item in session.items],
        "left_out": left_out,
    }
    with open(os.environ["REPORT"], "w") as file:
        json.dump(report, file)
"""
Report = dict[str, Any]


def collect(directory: Path, *, pretend: bool) -> Report:
    """What `pytest -m gpu` collects in a process of its own."""
    (directory / "pretended_gpu.py").write_text(PLUGIN)
    path = directory / "report.json"
    environment = plain_environment() | {
        "PYTHONPATH": str(directory),
        "PRETEND": "1" if pretend else "0",
        "REPORT": str(path),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "pytest", "-p", "pretended_gpu", "-p", "no:cacheprovider"]
    process = subprocess.run(
        [*command, "--collect-only", "-m", "gpu", str(TESTS)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=TESTS.parent,
        env=environment,
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def on_a_gpu(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """With a GPU pretended; Triton and CuPy as if they were for it."""
    pytest.importorskip("triton", reason="Triton is not installed")
    return collect(tmp_path_factory.mktemp("gpu"), pretend=True)


@pytest.fixture(scope="module")
def without_a_gpu(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return collect(tmp_path_factory.mktemp("cpu"), pretend=False)


def names_of(items: list[dict[str, Any]]) -> set[tuple[str, str]]:
    return {(item["file"], item["test"]) for item in items}


def test_the_lists_of_backends(on_a_gpu: Report, without_a_gpu: Report) -> None:
    """On a GPU nothing is interpreted or absent; the CPU's own backends are there on either machine."""
    lists, own = on_a_gpu["lists"], without_a_gpu["lists"]["ON_CPU"]
    assert lists["BACKENDS"] == lists["COMPILED"] == [*own, "triton", "cuda"]
    assert lists["HERE"] == lists["ON_CPU"] == own
    assert lists["INTERPRETED"] == lists["ABSENT"] == []
    lists = without_a_gpu["lists"]
    assert lists["HERE"] == lists["BACKENDS"] == [*own, *lists["INTERPRETED"]]
    assert lists["COMPILED"] == own and set(lists["ABSENT"]) >= {"triton", "cuda"}


def test_what_is_selected_on_a_gpu(on_a_gpu: Report) -> None:
    """Every body on every GPU backend in each dtype that it takes, "cuda" where nothing is called that it has not, and
    nothing that is about the CPU's backends."""
    selected = on_a_gpu["selected"]
    assert {item["backend"] for item in selected} == {"triton", "cuda", "None"}
    for backend in ("triton", "cuda"):
        own = [item for item in selected if item["backend"] == backend]
        assert {item["dtype"] for item in own} == {"float32", "bfloat16", "float16", "None"}
        for test in names_of(own):
            dtypes = {i["dtype"] for i in own if (i["file"], i["test"]) == test and i["dtype"] != "None"}
            refused = {
                item["dtype"]
                for item in on_a_gpu["left_out"]
                if (item["file"], item["test"], item["backend"]) == (*test, backend)
            }
            assert not dtypes or refused <= {"float64"} | dtypes, test  # `dtypes`: other numbers of threads
    own = [item for item in selected if item["backend"] == "cuda"]
    ops = {"attention_decode", "moe_route_forward"}
    assert {item["op"] for item in own} == ops
    assert names_of([i for i in selected if i["backend"] == "triton" and i["op"] in ops]) == names_of(own)
    tests = {item["test"] for item in own}
    assert {"test_decode_obeys_the_rule", "test_slots_give_what_gathered_states_give"} <= tests
    assert {"test_nan_never_leads_out_of_range", "test_sorting_is_stable"} <= tests
    without = {item["file"] for item in selected if item["backend"] == "None"}
    own_files = ("test_gpu", "test_triton", "test_autotune", "test_tuner", "test_cuda", "test_moe_tiles")
    assert {f for f in without if not f.startswith(own_files)} == set()


def test_nothing_is_lost_between_the_machines(on_a_gpu: Report, without_a_gpu: Report) -> None:
    """What the interpreter and the emulator run here is what the GPU runs there, and the other way round."""
    there, here = names_of(on_a_gpu["selected"]), names_of(without_a_gpu["selected"])
    with_variants = {
        (item["file"], item["test"]) for item in on_a_gpu["selected"] if item["backend"] != "None"
    }
    assert here - there <= ON_CPU_TENSORS
    assert with_variants - here <= COMPILED_ALONE


# Of backends on CPU tensors, whichever these are.
ON_CPU_TENSORS = {
    ("test_cli.py", "test_check_of_one_backend"),
    ("test_dispatch.py", "test_a_named_backend_runs"),
}
# Too long for an interpreter, or not for its one thread.
COMPILED_ALONE = {
    ("test_long.py", "test_a_million_tokens_with_slopes_from_0_to_1e4"),
    ("test_long.py", "test_gradients_of_a_quarter_million_tokens_with_slopes_from_0_to_1e4"),
    ("test_repeatability.py", "test_calls_from_several_python_threads_do_not_disturb_each_other"),
}
