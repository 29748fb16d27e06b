"""The tensors that an optimizer touches: what of them this process holds, and the order of their elements in memory.

The one module that knows of DTensor.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Order = tuple[int, ...]


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a parameter, a gradient or a state; all of them come through here.

    Raises:
        ValueError: the tensor is sharded otherwise than by FSDP2 over the ranks of one replica.
    """
    kind = _dtensor()
    if kind is None or not isinstance(tensor, kind):
        return tensor
    _check_sharding(tensor)
    with torch.no_grad():
        held: Tensor = tensor.to_local()
        return held


def device_of_backward(parameter: Tensor) -> str:
    """The kind of device on which gradients come to be: where FSDP2 offloads them, another than the parameter's."""
    kind = _dtensor()
    return str(parameter.device_mesh.device_type if kind and isinstance(parameter, kind) else parameter.device.type)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on all ranks of the replica; a collective over them, if it is sharded."""
    kind = _dtensor()
    return tensor.full_tensor() if kind is not None and isinstance(tensor, kind) else tensor


def placed_as(parameter: Tensor, held: Tensor) -> Tensor:
    """What this process holds of a state as a part of the whole, if that is what it holds of the parameter.

    Raises:
        ValueError: as of :func:`local`.
    """
    kind = _dtensor()
    if kind is None or not isinstance(parameter, kind):
        return held
    local(parameter)
    shape, stride = parameter.shape, parameter.stride()
    part: Tensor = kind.from_local(held, parameter.device_mesh, parameter.placements, shape=shape, stride=stride)
    return part


def alike_sharded(tensor: Tensor, parameter: Tensor) -> bool:
    """Whether both are whole, or parts of as many that are placed alike."""
    kind = _dtensor()
    places = [
        (t.shape, t.placements, t.device_mesh.size()) if kind is not None and isinstance(t, kind) else t.shape
        for t in (tensor, parameter)
    ]
    return bool(places[0] == places[1])


def shard_group(parameters: Sequence[Tensor]) -> dist.ProcessGroup | None:
    """The ranks over which the parameters are sharded, all over the same; None if they are whole.

    Raises:
        ValueError: some are sharded and others are not, or over other ranks.
    """
    kind = _dtensor()
    meshes = {tensor.device_mesh if kind is not None and isinstance(tensor, kind) else None for tensor in parameters}
    if len(meshes) > 1:
        raise ValueError(
            f"the parameters are not all sharded over the same ranks, but over {', '.join(map(str, meshes))} (None: "
            "not at all). Call fully_shard on the whole model, with the same mesh for all its modules and without "
            "ignored_params, before the first step."
        )
    mesh = next(iter(meshes), None)
    return None if mesh is None else mesh.get_group()


def _dtensor() -> Any:
    # It exists only where its module was loaded, and loading that takes a second.
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


def _check_sharding(tensor: Any) -> None:
    """Raise ValueError unless a DTensor is cut along its first dimension, over the ranks of a mesh of one."""
    if tensor.device_mesh.ndim > 1:
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} is sharded over {tensor.device_mesh}, of "
            f"{tensor.device_mesh.ndim} dimensions: its gradients would be averaged over all replicas, or it is split "
            'by tensor parallelism. Give fully_shard the shard dimension alone, mesh=mesh["dp_shard"], and the '
            'optimizer the other, process_group=mesh["dp_replicate"].get_group().'
        )
    [placement] = tensor.placements
    if type(placement) is not sys.modules["torch.distributed.tensor"].Shard or placement.dim != 0:
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} is placed as {placement}: of sharded models, those are supported "
            "whose parameters fully_shard has cut along their first dimension. Leave shard_placement_fn and tensor "
            "parallelism out."
        )


def check_parameter(parameter: Tensor, device: torch.device, name: str = "a parameter") -> None:
    """Raise ValueError unless the parameter, of that name, can be voted on, and is on that device."""
    parameter = local(parameter)
    if parameter.layout != torch.strided or not parameter.is_floating_point():
        raise ValueError(
            f"{name} has dtype {parameter.dtype}, layout {parameter.layout}, shape {tuple(parameter.shape)}: the "
            "sign of an update is defined for dense, real floating-point parameters. Leave others out of the optimizer."
        )
    if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"{name} has dtype {parameter.dtype}: updates are computed in float32, and would cut it to that. Convert "
            "the model: model.float()."
        )
    if parameter.device != device:
        raise ValueError(
            f"{name} is on {parameter.device}, and the first on {device}: one worker holds all its parameters on one "
            "device. Models spread over devices are not supported; use more workers, or LoRA."
        )
    try:
        memory_order(parameter)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def local_gradient(parameter: Tensor, owner: str) -> Tensor | None:
    """The gradient of a parameter, None if there is none.

    Args:
        parameter: whose gradient.
        owner: the class of the optimizer, for the error.

    Raises:
        RuntimeError: the gradient is sparse.
    """
    if parameter.grad is None:
        return None
    if parameter.grad.layout != torch.strided:
        raise RuntimeError(
            f"a gradient of layout {parameter.grad.layout} (parameter of shape {tuple(parameter.shape)}): {owner} "
            "works on every element. Use dense gradients, as nn.Embedding(sparse=False) gives."
        )
    return local(parameter.grad)


def float32_state(parameter: Tensor) -> Tensor:
    """Zeros of the parameter's shape, in its memory order."""
    return torch.zeros_like(
        local(parameter), dtype=torch.float32, requires_grad=False, memory_format=torch.preserve_format
    )


def laid_out_state(parameter: Tensor, state: Tensor | None) -> Tensor:
    """A state in the memory order of its parameter and on its device, itself if it is so; zeros if there is none."""
    if state is None:
        return float32_state(parameter)
    held = local(parameter)
    in_place = state.stride() == held.stride() and state.device == held.device
    return state if in_place else float32_state(parameter).copy_(state)


def memory_order(tensor: Tensor) -> Order:
    """The permutation of the dimensions that makes a dense tensor contiguous.

    Raises:
        ValueError: the tensor has holes or overlaps itself.
    """
    strides = tensor.stride()
    order = tuple(sorted(range(tensor.dim()), key=lambda i: (-strides[i], -tensor.shape[i], i)))
    if not tensor.permute(order).is_contiguous():
        raise ValueError(
            f"a parameter of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not dense in memory, and "
            "cannot be updated in place. Replace it by `parameter.contiguous()` before making the optimizer."
        )
    return order


def as_laid_out(flat: Tensor, shape: torch.Size, order: Order) -> Tensor:
    """A flat tensor in the memory order of a parameter, as a view of the parameter's shape."""
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return flat.view([shape[i] for i in order]).permute(inverse)


def flatten(tensor: Tensor, order: Order) -> Tensor:
    """The elements in the memory order of the parameter, without gaps; a view where the tensor has it itself."""
    if tensor.is_contiguous() and order == tuple(range(tensor.dim())):
        return tensor.detach().view(-1)
    # A view of one dimension can be expanded or have gaps, as a gradient may.
    return tensor.detach().permute(order).reshape(-1).contiguous()
