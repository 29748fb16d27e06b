"""Muon's orthogonalisation (Jordan et al., 2024, "Muon: an optimizer for hidden layers in neural networks").

And one of three steps. Its polynomials are found one after the other, as in Polar Express (Amsel et al., 2025, arXiv
2505.16932): each is the odd one of degree 5 that is nearest to 1, by its largest distance, on all that the ones before
make of the singular values from 0.003 to 1, in units of the root of the norm of XX^T, which none exceeds. In the end,
they are within 0.66 of 1. Each leaves room for rounding in bfloat16, 1 or 2 %: just above its interval it grows fast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_COEFFICIENTS: dict[int, Sequence[tuple[float, float, float]]] = {
    5: ((3.4445, -4.7750, 2.0315),) * 5,
    3: ((8.2193, -23.3375, 16.6266), (4.0034, -2.9228, 0.5419), (3.4709, -2.5494, 0.5002)),
}
NS_STEPS = tuple(_COEFFICIENTS)
_EPS = 1e-7
_MAX_BATCH, _MAX_BATCH_ON_GPU = 1 << 22, 1 << 24
"""Elements that go through one batched product, at most, if they are of several matrices."""


def orthogonalize(matrices: Sequence[Tensor], ns_steps: int = 5) -> Tensor:
    """Newton-Schulz steps that take all singular values to about 1, and leave the singular vectors.

    Args:
        matrices: k of them, each ``[rows, columns]``.
        ns_steps: 5, Muon's; or 3, which take them less near to 1.

    Returns:
        ``[k, rows, columns]``; bfloat16 on GPUs, float32 on CPUs. But for 3 steps, bfloat16 also on CPUs that multiply
        it. Zero where a matrix is zero.
    """
    rows, columns = matrices[0].shape
    x = torch.stack([matrix.mT if rows > columns else matrix for matrix in matrices]).float()
    x.div_(torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + _EPS)
    if x.device.type != "cpu" or (ns_steps == 3 and multiplies_bfloat16()):
        x = x.bfloat16()
    # In place: what a step needs is as large as the matrices, and fresh memory costs page faults.
    gram = x.new_empty(len(x), x.shape[1], x.shape[1])
    square, moved = torch.empty_like(gram), torch.empty_like(x)
    for step, (a, b, c) in enumerate(_COEFFICIENTS[ns_steps]):
        torch.bmm(x, x.mT, out=gram)
        if ns_steps == 3 and step == 0:
            # The norm of XX^T bounds the square of the largest singular value, and more tightly than that of X.
            norm = torch.linalg.vector_norm(gram, dim=(1, 2), keepdim=True, dtype=torch.float32) + _EPS
            gram.div_(norm)
            x.div_(norm.sqrt())
        torch.bmm(gram, gram, out=square)
        gram.mul_(b).add_(square.mul_(c))
        torch.bmm(gram, x, out=moved)
        x.mul_(a).add_(moved)
    return x.mT if rows > columns else x


def multiplies_bfloat16() -> bool:
    """Whether this x86 CPU multiplies matrices of bfloat16 in hardware, twice as fast as those of float32 or more."""
    asked = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    onednn = torch.backends.mkldnn
    return bool(onednn.is_available() and onednn.enabled and any(ask is not None and ask() for ask in asked))


def orthogonalize_into(matrices: Sequence[Tensor], outputs: Sequence[Tensor], ns_steps: int = 5) -> None:
    """Each matrix into the output beside it; those of one shape go through batched products.

    Args:
        matrices: 2-D.
        outputs: of the shapes of the matrices, of any dtype; or the matrices themselves.
        ns_steps: as of :func:`orthogonalize`.
    """
    shapes: dict[torch.Size, list[int]] = {}
    for index, matrix in enumerate(matrices):
        shapes.setdefault(matrix.shape, []).append(index)
    for shape, indices in shapes.items():
        most = _MAX_BATCH if matrices[indices[0]].device.type == "cpu" else _MAX_BATCH_ON_GPU
        count = max(1, most // max(shape.numel(), 1))
        for start in range(0, len(indices), count):
            chosen = indices[start : start + count]
            found = orthogonalize([matrices[index] for index in chosen], ns_steps)
            for index, result in zip(chosen, found, strict=True):
                outputs[index].copy_(result)
