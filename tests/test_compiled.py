"""The compiler's gate: what Triton makes of every kernel for GPUs that need not be here, and what the launches say they
move. The report compiles everything once, in processes of its own, for all tests here.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).resolve().parent.parent

from benchmarks import compile_gate as gate
from benchmarks.compile_gate import Row
from lightning_attn.backends.triton import catalogue
from lightning_attn.backends.triton.config import ARCHS, KIB

COMMITTED = ROOT / "benchmarks" / "results" / "compile.json"
KERNELS = {
    "chunk",
    "chunk_state",
    "chunk_history",
    "scan",
    "decode",
    "gated_rms_norm_forward",
    "gated_rms_norm_backward",
    "gated_rms_norm_dweight",
}
BACKWARD = {"chunk_backward", "chunk_backward_split"}  # one or the other
EXPERTS = {
    "moe_route",
    "moe_route_backward",
    "moe_count",
    "moe_place",
    "moe_gather",
    "moe_gather_sum",
    "expert_up",
    "expert_activation_backward",
    "grouped_gemm",
    "weight_gradient",
}
GOOD = Row(
    *("sm_90", 128, "bfloat16", "forward", "dense", "chunk"),
    *((64, 128, 64), 8, 3),
    registers=200,
    shared=128 * KIB,
    matrix_products={"wgmma": 40},
    async_copies=30,
)

Process = subprocess.CompletedProcess[str]


def python(*arguments: str | Path, interpreted: bool = False, **environment: str) -> Process:
    """From the root of the repository, with or without Triton's interpreter, whatever this process has."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpreted:
        env["TRITON_INTERPRET"] = "1"
    env |= environment
    # `python path/to/file.py` has that file's directory in its path, not the current one.
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )


def rows_of(document: dict[str, Any]) -> list[Row]:
    return [Row(**{**row, "tiles": tuple(row["tiles"])}) for row in document["rows"]]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Process, dict[str, Any]]:
    """A run of the report, and its JSON."""
    path = tmp_path_factory.mktemp("report") / "compile.json"
    process = python("-m", "benchmarks.compile_report", "--json", path)
    assert path.exists() and path.stat().st_size, process.stderr
    return process, json.loads(path.read_text())


@pytest.fixture(scope="module")
def rows(report: tuple[Process, dict[str, Any]]) -> list[Row]:
    return rows_of(report[1])


def configurations() -> list[tuple[str, int, str]]:
    """What has to compile."""
    everywhere = [(a, d, t) for a in gate.MAIN_ARCHS for d in gate.DIMS for t in gate.DTYPES]
    consumers = [
        (a, d, t) for a in gate.CONSUMER_ARCHS for d in gate.CONSUMER_DIMS for t in gate.CONSUMER_DTYPES
    ]
    return everywhere + consumers


def uncovered(rows: list[Row]) -> list[tuple[str, int, str]]:
    kernels = defaultdict(set)
    for row in rows:
        kernels[row.arch, row.dim, row.dtype].add(row.kernel)
    return [c for c in configurations() if not (kernels[c] >= KERNELS and kernels[c] & BACKWARD)]


# ---- the gate ----------------------------------------------------------------------------------------------------


def test_what_is_asked() -> None:
    """The architectures, head dims and dtypes, and their shared memory."""
    assert set(gate.MAIN_ARCHS) == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert set(gate.DIMS) == {64, 96, 128, 256}
    assert set(gate.DTYPES) == {"bfloat16", "float16", "float32"}
    assert {"sm_86", "sm_89"} <= set(gate.CONSUMER_ARCHS)
    limits = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227}
    assert {arch: gate.SHARED_LIMITS[arch] / KIB for arch in limits} == limits
    assert gate.may_not_spill("sm_90", 128, "bfloat16") and gate.may_not_spill("sm_80", 64, "float16")


def test_everything_is_compiled(rows: list[Row]) -> None:
    """Each kernel for each architecture, head dim and dtype."""
    assert not uncovered(rows)
    kernels = {row.kernel for row in rows}
    assert kernels == KERNELS | BACKWARD | EXPERTS, "a kernel that the gate does not know"
    experts = {
        (row.arch, row.dtype, row.kernel): row.variant for row in reversed(rows) if row.dim == gate.EXPERTS
    }
    for arch in gate.MAIN_ARCHS + gate.CONSUMER_ARCHS:
        for dtype in gate.EXPERT_DTYPES.get(arch, ("bfloat16",)):
            for kernel in EXPERTS:
                assert experts[arch, dtype, kernel] == "T=8192", (arch, dtype, kernel)


def test_every_way_of_the_experts_is_compiled_where_none_may_spill(rows: list[Row]) -> None:
    """Prefill, small batch and decode step, int8 too; the tails of 16, 32 and 64 rows are in the same kernels."""
    for arch in ("sm_80", "sm_90"):
        assert gate.may_not_spill(arch, gate.EXPERTS, "bfloat16")
        found = {
            (row.kernel, row.variant)
            for row in rows
            if (row.arch, row.dim, row.dtype) == (arch, gate.EXPERTS, "bfloat16")
        }
        for kernel in ("expert_up", "grouped_gemm"):
            for T in ("T=1", "T=32", "T=8192"):
                assert {(kernel, T), (kernel, f"{T}, int8")} <= found
        assert ("expert_up", "T=8192, interleaved") in found


def test_every_variant_is_compiled_where_none_may_spill(rows: list[Row]) -> None:
    """Packed, split, with states, with slots: each has registers of its own."""
    for configuration in filter(lambda c: gate.may_not_spill(*c), configurations()):
        variants = {
            f"{row.operation}, {row.variant}"
            for row in rows
            if (row.arch, row.dim, row.dtype) == configuration
        }
        for operation in ("forward", "backward"):
            for variant in ("dense", "packed, states", "split", "split, packed, states"):
                # The gradient of q, dense and without a state, is the kernel of the forward pass.
                assert f"{operation}, {variant}" in variants, configuration
        assert {"decode, T=1", "decode, T=4, slots, bfloat16"} <= variants


@pytest.mark.parametrize("dtype", gate.DTYPES)
@pytest.mark.parametrize("arch", gate.MAIN_ARCHS)
def test_variants_are_what_they_are_called(arch: str, dtype: str) -> None:
    """Sequences are cut in segments in those that say so, and in no others."""
    for dim in gate.DIMS:
        for entry in catalogue.catalogue(dim, getattr(torch, dtype), ARCHS[arch]):
            if "entering" in entry.launch.arguments and entry.launch.kernel.__name__.startswith("chunk"):
                cut = entry.launch.arguments["entering"] is not None
                assert cut == entry.variant.startswith("split"), (dim, entry.operation, entry.variant)


@pytest.mark.parametrize("rule", gate.RULES.values(), ids=list(gate.RULES))
def test_rule(rule: Callable[[Row], str | None], rows: list[Row]) -> None:
    """No kernel breaks it."""
    broken = [f"{row} {fault}" for row in rows if (fault := rule(row))]
    assert not broken, "\n".join(broken)


def test_hopper_has_wgmma_and_asynchronous_copies(rows: list[Row]) -> None:
    """Forward and backward, in 16 bits, at every head dim; said again without the gate's own rules. And the experts'
    products of large tiles, by descriptor.
    """
    large = [
        row
        for row in rows
        if (row.arch, row.dtype) == ("sm_90", "bfloat16")
        and row.kernel in ("expert_up", "grouped_gemm")
        and row.variant == "T=8192"
    ]
    assert len(large) >= 3 and all(row.descriptor_copies for row in large)
    kernels = [
        row
        for row in rows
        if row.arch == "sm_90" and row.dtype != "float32" and row.operation in ("forward", "backward")
    ]
    assert {(row.operation, row.dim) for row in kernels} == {
        (operation, dim) for operation in ("forward", "backward") for dim in gate.DIMS
    }
    for row in kernels:
        if row.kernel != "scan":
            assert row.matrix_products and row.matrix_products.get("wgmma", 0) > 0, row
            assert row.async_copies > 0, row


def test_the_report_says_what_the_gate_says(report: tuple[Process, dict[str, Any]], rows: list[Row]) -> None:
    """It exits with 1 if there is a fault, with 0 if there is none, and names each."""
    process, _ = report
    faults = gate.faults(rows)
    assert process.returncode == (1 if faults else 0), process.stdout[-2000:] + process.stderr[-2000:]
    for fault in faults:
        assert fault in process.stdout


@pytest.mark.parametrize(
    "rule, bad",
    [
        ("compiles", replace(GOOD, error="ptxas died")),
        ("spills_nothing", replace(GOOD, spills=8)),
        ("spills_nothing", replace(GOOD, arch="sm_80", dim=64, dtype="float16", spills=4)),
        ("fits_in_shared_memory", replace(GOOD, shared=228 * KIB)),
        ("fits_in_shared_memory", replace(GOOD, arch="sm_80", shared=164 * KIB)),
        ("fits_in_shared_memory", replace(GOOD, arch="sm_89", shared=100 * KIB)),
        ("fits_in_shared_memory", replace(GOOD, arch="gfx942", shared=65 * KIB)),
        ("uses_tensor_cores", replace(GOOD, matrix_products={"mma": 40})),
        ("uses_tensor_cores", replace(GOOD, kernel="chunk_backward", matrix_products={})),
        ("copies_asynchronously", replace(GOOD, async_copies=0)),
        ("copies_asynchronously", replace(GOOD, kernel="chunk_backward_split", async_copies=0)),
        ("copies_asynchronously", replace(GOOD, kernel="weight_gradient", async_copies=0)),
        ("uses_tensor_cores", replace(GOOD, kernel="expert_up", matrix_products={})),
        ("spills_nothing", replace(GOOD, kernel="expert_up", dim=gate.EXPERTS, spills=8)),
        ("copies_by_descriptor", replace(GOOD, kernel="grouped_gemm", tiles=(128, 64, 256))),
    ],
)
def test_the_gate_can_fail(rule: str, bad: Row) -> None:
    """Each rule rejects what it is there for, and nothing else does."""
    assert not gate.faults([GOOD])
    assert [name for name, check in gate.RULES.items() if check(bad)] == [rule]
    assert len(gate.faults([GOOD, bad])) == 1


def test_a_missing_kernel_is_noticed(rows: list[Row]) -> None:
    """The check of completeness itself."""
    fewer = [row for row in rows if (row.arch, row.dim, row.kernel) != ("gfx942", 96, "scan")]
    assert uncovered(fewer) == [("gfx942", 96, dtype) for dtype in gate.DTYPES]


def test_committed_result() -> None:
    """Without a fault, of everything, and it says with which versions."""
    document = json.loads(COMMITTED.read_text())
    assert set(document) == {"versions", "date", "rows", "traffic"}
    assert set(document["versions"]) == {"torch", "triton"}
    committed = rows_of(document)
    assert not uncovered(committed) and not gate.faults(committed)


# ---- how figures are read ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    # Nothing from a cache.
    process = python("tests/compile_probes.py", TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("cache")))
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_specialisation_matters(probes: dict[str, dict[str, Any]]) -> None:
    """Operands that are not aligned are not copied asynchronously: a report without alignment would say so of all."""
    assert probes["usual"]["async_copies"] > 0
    assert probes["unaligned"]["async_copies"] == 0


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_spills_are_seen(probes: dict[str, dict[str, Any]], arch: str) -> None:
    """A tile that no register file holds has them."""
    assert probes["usual"]["spills"] == 0
    assert probes[f"too_wide {arch}"]["spills"] > 100


def test_interpreted_kernels_are_not_compiled() -> None:
    """The report and `compile_launch` say so; nothing passes for a result."""
    process = python("-m", "benchmarks.compile_report", "--arch", "sm_90", "--dim", "64", interpreted=True)
    assert process.returncode == 1 and "TRITON_INTERPRET" in process.stderr
    process = python("tests/compile_probes.py", interpreted=True)
    assert process.returncode == 1 and "TRITON_INTERPRET" in process.stderr


# ---- bytes and flops ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def traffic(report: tuple[Process, dict[str, Any]]) -> list[dict[str, Any]]:
    return report[1]["traffic"]


def of(traffic: list[dict[str, Any]], operation: str) -> list[dict[str, Any]]:
    """The rows of an operation: one for each architecture."""
    found = [row for row in traffic if row["operation"] == operation]
    assert {row["arch"] for row in found} == set(gate.MAIN_ARCHS)
    return found


def test_one_pass_moves_each_operand_once(traffic: list[dict[str, Any]]) -> None:
    """At d = 128 in 16 bits: q, k, v, o; backward do, v, k, dq and q, k, v, do, dk, dv."""
    for row in of(traffic, "forward, one pass"):
        assert row["bytes"] == row["floor"] == 1024
    for row in of(traffic, "backward, one pass"):
        assert row["bytes"] == row["floor"] == 2560


def test_split_reads_two_operands_more(traffic: list[dict[str, Any]]) -> None:
    """And the states between segments, which are few: the length of a segment is chosen so."""
    for operation, floor in (("forward, split", 1536), ("backward, split", 3584)):
        for row in of(traffic, operation):
            assert row["floor"] == floor
            assert 0 < row["segment_states"] < 0.03 * floor, row
            # The last segment of a sequence leaves its state to nobody, so that its operands are read once less.
            assert 0.9 * floor < row["bytes"] - row["segment_states"] <= floor, row


def test_decode_reads_and_writes_the_state_once(traffic: list[dict[str, Any]]) -> None:
    """128 KiB in float32, and a token of q, k, v and o."""
    for state, size in (("float32", 4), ("bfloat16", 2)):
        for row in of(traffic, f"decode, {state} state"):
            assert row["bytes"] == row["floor"] == 2 * 128 * 128 * size + 4 * 128 * 2


def test_the_norm_moves_each_operand_once(traffic: list[dict[str, Any]]) -> None:
    """x, gate, y; backward dy, x, gate, dx, dgate. Beside these the weight, a number for each row, and sums."""
    for operation, operands, beside in (("forward", 3, 0.01), ("backward", 5, 0.1)):
        for row in of(traffic, f"gated_rms_norm, {operation}"):
            assert row["floor"] == 2 * operands
            assert row["floor"] <= row["bytes"] <= (1 + beside) * row["floor"], row


def test_every_operation_counts_its_flops(traffic: list[dict[str, Any]]) -> None:
    assert all(row["flops"] > 0 for row in traffic)


@pytest.fixture(scope="module")
def counts() -> list[dict[str, Any]]:
    process = python("tests/count_traffic.py", interpreted=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_bytes_are_those_of_the_loads_and_stores(counts: list[dict[str, Any]]) -> None:
    """Of each launch, every address once as read and once as written, recorded while it runs."""
    exact = [row for row in counts if "split" not in row["call"]]
    assert {row["kernel"] for row in exact} >= (KERNELS | {"chunk_backward_split"}) - {"chunk_state", "scan"}
    for row in exact:
        assert row["done"]["bytes"] == row["said"]["bytes"], row
    for row in counts:
        assert row["done"]["written_again"] == 0, row


def test_bytes_of_segments(counts: list[dict[str, Any]]) -> None:
    """Never less than what is moved; more by what a launch cannot know, or hardly cares about: a last segment that is
    shorter, documents that end in a segment.
    """
    split = [row for row in counts if "split" in row["call"]]
    assert {row["kernel"] for row in split} >= {"chunk", "chunk_state", "scan", "chunk_backward_split"}
    for row in split:
        assert 0.7 * row["said"]["bytes"] <= row["done"]["bytes"] <= row["said"]["bytes"], row
        if row["kernel"] == "scan" or row["call"].endswith("split"):
            assert row["done"]["bytes"] == row["said"]["bytes"], row


def test_what_is_read_again(counts: list[dict[str, Any]]) -> None:
    """By the programs of other columns; the states that two halves of a launch read are not counted."""
    for row in counts:
        if row["kernel"] in ("chunk", "chunk_state", "decode") or row["kernel"].startswith("gated_rms_norm"):
            assert row["done"]["again"] == row["said"]["again"], row
    for row in counts:
        if row["kernel"] == "chunk_backward_split" and row["call"] in (
            "backward, one pass",
            "backward, ragged",
        ):
            assert row["done"]["again"] == row["said"]["again"], row


def test_flops_are_those_of_the_products(counts: list[dict[str, Any]]) -> None:
    """Of whole blocks; the last one of a document is computed in full."""
    for row in counts:
        if row["kernel"].startswith("chunk"):
            whole = "ragged" not in row["call"] and "split, packed" not in row["call"]
            assert row["done"]["flops"] >= row["said"]["flops"] > 0, row
            assert row["done"]["flops"] == row["said"]["flops"] or not whole, row
