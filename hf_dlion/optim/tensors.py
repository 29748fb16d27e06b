"""The tensors that an optimizer touches: what of them this process holds, and the order of their elements in memory.

The one module that knows of DTensor.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

Order = tuple[int, ...]


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a parameter, a gradient or a state; all of them come through here.

    Raises:
        ValueError: the tensor is sharded.
    """
    # A DTensor exists only where its module was loaded, and loading that takes a second.
    module = sys.modules.get("torch.distributed.tensor")
    if module is not None and isinstance(tensor, module.DTensor):
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} is a DTensor, sharded over {tensor.device_mesh}: sharded models "
            "(FSDP2, tensor parallelism) are not supported yet. Let every worker hold the whole model: leave "
            "fully_shard out, and use DistributedDataParallel."
        )
    return tensor


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
    """The elements in the memory order of the parameter; a view where the tensor has that order itself."""
    if tensor.is_contiguous() and order == tuple(range(tensor.dim())):
        return tensor.detach().view(-1)
    return tensor.detach().permute(order).reshape(-1)
