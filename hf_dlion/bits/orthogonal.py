"""Muon's orthogonalisation (Jordan et al., 2024, "Muon: an optimizer for hidden layers in neural networks")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_EPS = 1e-7
_MAX_BATCH, _MAX_BATCH_ON_GPU = 1 << 22, 1 << 24
"""Elements that go through one batched product, at most, if they are of several matrices."""


def orthogonalize(matrices: Tensor) -> Tensor:
    """Five iterations that take all singular values to about 1, and leave the singular vectors.

    Args:
        matrices: float32 ``[k, rows, columns]``.

    Returns:
        Of that shape; bfloat16 on GPUs, float32 on CPUs. Zero where a matrix is zero.
    """
    a, b, c = _COEFFICIENTS
    x = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + _EPS)
    if x.device.type != "cpu":
        x = x.bfloat16()
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if matrices.shape[1] > matrices.shape[2] else x


def orthogonalize_into(matrices: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Each matrix into the output beside it; those of one shape go through batched products.

    Args:
        matrices: 2-D.
        outputs: of the shapes of the matrices, of any dtype.
    """
    shapes: dict[torch.Size, list[int]] = {}
    for index, matrix in enumerate(matrices):
        shapes.setdefault(matrix.shape, []).append(index)
    for shape, indices in shapes.items():
        most = _MAX_BATCH if matrices[indices[0]].device.type == "cpu" else _MAX_BATCH_ON_GPU
        count = max(1, most // max(shape.numel(), 1))
        for start in range(0, len(indices), count):
            chosen = indices[start : start + count]
            found = orthogonalize(torch.stack([matrices[index] for index in chosen]).float())
            for index, result in zip(chosen, found, strict=True):
                outputs[index].copy_(result)
