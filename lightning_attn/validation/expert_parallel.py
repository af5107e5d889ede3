"""The errors of ExpertParallel."""

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .common import dims, floating, index, same_device, types
from .moe import router_logits

FUNCTION = "ExpertParallel"
DIMENSIONS = ("edp", "ep", "etp")


def expert_parallel(moe: object, kind: type, mesh: DeviceMesh, groups: int) -> None:
    """The types of the arguments of ExpertParallel, and the mesh."""
    if not isinstance(moe, kind):
        raise TypeError(f"{FUNCTION}: expected moe to be a {kind.__name__}, got {type(moe).__name__}")
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"{FUNCTION}: expected mesh to be a DeviceMesh, got {type(mesh).__name__}")
    if not isinstance(groups, int) or isinstance(groups, bool):
        raise TypeError(f"{FUNCTION}: expected groups to be an int, got {type(groups).__name__}")
    if groups < 1:
        raise ValueError(f"{FUNCTION}: expected groups >= 1, got {groups}")
    names = mesh.mesh_dim_names
    if not names or not set(names) <= set(DIMENSIONS):
        raise ValueError(
            f"{FUNCTION}: expected mesh dimensions named among {', '.join(DIMENSIONS)}, got {names or 'no names'}"
        )
    if mesh.get_coordinate() is None:
        raise ValueError(f"{FUNCTION}: expected a mesh that this rank is in, got one without it")
    ranks = mesh.mesh
    for dim, name in enumerate(names):
        if not (ranks.diff(dim=dim) > 0).all():  # a group orders its ranks so
            raise ValueError(
                f"{FUNCTION}: expected a mesh whose ranks rise along {name}, got {ranks.tolist()}"
            )


def expert_split(num_experts: int, intermediate_size: int, ep: int, etp: int) -> None:
    """That the experts and their intermediate dimension divide."""
    if num_experts % ep:
        raise ValueError(
            f"{FUNCTION}: expected a number of experts divisible by ep = {ep}, got {num_experts}"
        )
    if intermediate_size % etp:
        raise ValueError(
            f"{FUNCTION}: expected an intermediate size divisible by etp = {etp}, got {intermediate_size}"
        )


def expert_dense(moe: object, kind: type, sizes: tuple[int, ...], quantized: bool) -> None:
    """The argument of load_dense, whose sizes (D, F, E) and kind of experts must be the module's."""
    function = f"{FUNCTION}.load_dense"
    if not isinstance(moe, kind):
        raise TypeError(f"{function}: expected moe to be a {kind.__name__}, got {type(moe).__name__}")
    given = tuple(getattr(moe, name) for name in ("hidden_size", "intermediate_size", "num_experts"))
    if given != sizes:
        raise ValueError(f"{function}: expected a moe of D, F, E = {sizes}, got {given}")
    if getattr(moe, "quantized") != quantized:  # noqa: B009 - its type is checked above
        kinds = ("int8", "floating-point") if quantized else ("floating-point", "int8")
        raise ValueError(f"{function}: expected {kinds[0]} experts, got {kinds[1]}")


def expert_input(x: Tensor, backend: str, hidden_size: int, gate: Tensor, quantized: bool) -> None:
    """The structure of the arguments of forward."""
    types(FUNCTION, backend, x=x)
    floating(FUNCTION, "x", x)
    if x.dim() == 0 or x.shape[-1] != hidden_size:
        raise ValueError(f"{FUNCTION}: expected x of shape [..., {hidden_size}], got {dims(x)}")
    same_device(FUNCTION, "x", x, "gate.weight", gate)
    if quantized and torch.is_grad_enabled():
        for name, t in (("x", x), ("gate.weight", gate)):
            if t.requires_grad:
                raise ValueError(
                    f"{FUNCTION}: expected {name} without requires_grad (int8 experts are not differentiable: use "
                    "torch.no_grad()), got a tensor that requires grad"
                )


def expert_dtype(x: Tensor, **parameters: Tensor) -> None:
    """That the parameters have the dtype of x, after autocast; int8 aside."""
    for name, w in parameters.items():
        if w.dtype not in (x.dtype, torch.int8):
            raise TypeError(f"{FUNCTION}: expected x of the dtype of {name}, {w.dtype}, got {x.dtype}")


def load_balancing_share(logits: Tensor, experts: Tensor) -> None:
    """The structure of the arguments of load_balancing_share."""
    function = "load_balancing_share"
    router_logits(function, logits)
    index(function, "experts", experts, logits, "logits")
    if experts.dim() != 2 or experts.shape[0] != logits.shape[0]:
        raise ValueError(
            f"{function}: expected experts of shape [T, k] = [{logits.shape[0]}, k], got {dims(experts)}"
        )
