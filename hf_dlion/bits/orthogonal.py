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


def orthogonalize(matrices: Sequence[Tensor]) -> Tensor:
    """Five iterations that take all singular values to about 1, and leave the singular vectors.

    Args:
        matrices: k of them, each ``[rows, columns]``.

    Returns:
        ``[k, rows, columns]``; bfloat16 on GPUs, float32 on CPUs. Zero where a matrix is zero.
    """
    a, b, c = _COEFFICIENTS
    rows, columns = matrices[0].shape
    x = torch.stack([matrix.mT if rows > columns else matrix for matrix in matrices]).float()
    x.div_(torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + _EPS)
    if x.device.type != "cpu":
        x = x.bfloat16()
    # In place: what an iteration needs is as large as the matrices, and fresh memory costs page faults.
    gram = x.new_empty(len(x), x.shape[1], x.shape[1])
    square, moved = torch.empty_like(gram), torch.empty_like(x)
    for _ in range(_ITERATIONS):
        torch.bmm(x, x.mT, out=gram)
        torch.bmm(gram, gram, out=square)
        gram.mul_(b).add_(square.mul_(c))
        torch.bmm(gram, x, out=moved)
        x.mul_(a).add_(moved)
    return x.mT if rows > columns else x


def orthogonalize_into(matrices: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Each matrix into the output beside it; those of one shape go through batched products.

    Args:
        matrices: 2-D.
        outputs: of the shapes of the matrices, of any dtype; or the matrices themselves.
    """
    shapes: dict[torch.Size, list[int]] = {}
    for index, matrix in enumerate(matrices):
        shapes.setdefault(matrix.shape, []).append(index)
    for shape, indices in shapes.items():
        most = _MAX_BATCH if matrices[indices[0]].device.type == "cpu" else _MAX_BATCH_ON_GPU
        count = max(1, most // max(shape.numel(), 1))
        for start in range(0, len(indices), count):
            chosen = indices[start : start + count]
            found = orthogonalize([matrices[index] for index in chosen])
            for index, result in zip(chosen, found, strict=True):
                outputs[index].copy_(result)
