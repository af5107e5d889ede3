"""What the compiler must make of every kernel, without any GPU: the rules, and which kernels they are asked of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lightning_attn.backends.triton import moe_catalogue
from lightning_attn.backends.triton.config import ARCHS, KIB

DTYPES = ("bfloat16", "float16", "float32")
DIMS = (64, 96, 128, 256)
# Every dtype and head dim on these; on the others, which get the tiles of sm_80, those with the largest tiles.
MAIN_ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
CONSUMER_ARCHS = ("sm_86", "sm_89", "sm_120")
CONSUMER_DIMS = (128, 256)
CONSUMER_DTYPES = ("bfloat16", "float32")

# The mixture of experts, in the place of a head dim: at one shape, that of MiniMax-Text-01.
EXPERTS = moe_catalogue.HIDDEN
EXPERT_DTYPES = {"sm_80": ("bfloat16", "float16"), "sm_90": DTYPES}  # of others bfloat16

LARGE = 128  # rows of the tiles that come by descriptor

SHARED_LIMITS = {name: arch.shared for name, arch in ARCHS.items()}


@dataclass(frozen=True)
class Row:
    """One kernel, compiled; `error` is what the compiler said if it could not, and then the figures are 0."""

    arch: str
    dim: int
    dtype: str
    operation: str
    variant: str
    kernel: str
    tiles: tuple[int, int, int]  # tokens (rows), columns of K, columns of V
    warps: int
    stages: int
    registers: int = 0
    spills: int = 0  # bytes of a thread
    shared: int = 0  # bytes of a program
    matrix_products: dict[str, int] | None = None  # instructions, by kind
    async_copies: int = 0  # instructions
    descriptor_copies: int = 0  # of these, those of tiles by descriptor (TMA)
    error: str | None = None

    def __str__(self) -> str:
        where = f"{self.kernel} ({self.operation}, {self.variant}) d={self.dim} {self.dtype} {self.arch}"
        return f"{where}, tiles {self.tiles}, {self.warps} warps, {self.stages} stages"


def may_not_spill(arch: str, dim: int, dtype: str) -> bool:
    """At the head dims of models, in the dtypes that they run in; of the experts in that of MiniMax-Text-01."""
    if dim == EXPERTS:
        return arch in ("sm_80", "sm_90") and dtype == "bfloat16"
    return arch in ("sm_80", "sm_90") and dim in (64, 128) and dtype != "float32"


def compiles(row: Row) -> str | None:
    return row.error and f"does not compile: {row.error}"


def spills_nothing(row: Row) -> str | None:
    if row.spills and may_not_spill(row.arch, row.dim, row.dtype):
        return f"spills {row.spills} bytes a thread"
    return None


def fits_in_shared_memory(row: Row) -> str | None:
    limit = SHARED_LIMITS[row.arch]
    if row.shared > limit:
        return f"takes {row.shared / KIB:.1f} KB of shared memory of {limit // KIB} KB"
    return None


def uses_tensor_cores(row: Row) -> str | None:
    if _multiplies_on_hopper(row) and not (row.matrix_products or {}).get("wgmma"):
        return "has no wgmma"
    return None


def copies_asynchronously(row: Row) -> str | None:
    if _multiplies_on_hopper(row) and not row.async_copies:
        return "has no asynchronous copy: nothing is pipelined"
    return None


def copies_by_descriptor(row: Row) -> str | None:
    of_groups = row.kernel in ("expert_up", "grouped_gemm") and row.tiles[0] == LARGE
    if row.arch in ("sm_90", "sm_100") and of_groups and row.dtype != "float32" and row.error is None:
        return None if row.descriptor_copies else "has no copy by descriptor"
    return None


def _multiplies_on_hopper(row: Row) -> bool:
    """float32 is left out: tensor cores have no such product. So are products of few rows, which are no work for them."""
    of_groups = row.kernel in ("expert_up", "grouped_gemm", "weight_gradient") and row.tiles[0] >= 16
    return (
        row.arch == "sm_90"
        and row.dtype != "float32"
        and (row.kernel.startswith("chunk") or of_groups)
        and row.error is None
    )


RULES: dict[str, Callable[[Row], str | None]] = {
    rule.__name__: rule
    for rule in (
        compiles,
        spills_nothing,
        fits_in_shared_memory,
        uses_tensor_cores,
        copies_asynchronously,
        copies_by_descriptor,
    )
}


def faults(rows: Iterable[Row]) -> list[str]:
    """What the rules have against `rows`."""
    found = ((row, rule(row)) for row in rows for rule in RULES.values())
    return [f"{row} {fault}" for row, fault in found if fault]
