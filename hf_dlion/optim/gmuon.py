"""Muon on the averaged gradient (Jordan et al., 2024): the control of :mod:`hf_dlion.optim.muon`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from typing_extensions import Unpack, override

from ..bits.orthogonal import orthogonalize_into
from .hidden import ORTHOGONAL, SPLIT, UPDATE_RMS, HiddenMatricesMixin, move_momentum, orthogonalize_directions
from .layout import Span
from .mean_gradient import DenseMean
from .sharding import orthogonalize_shards
from .states import all_parameters
from .tensors import local
from .workers import WorkersOptions


class GlobalMuon(HiddenMatricesMixin, DenseMean):
    """Muon on the mean of the workers' gradients, for hidden matrices; AdamW for the rest.

    With the mean gradient g of a hidden matrix ``[r, c]``::

        u = beta1 * m + (1 - beta1) * g
        m = beta2 * m + (1 - beta2) * g
        x = x - lr * (0.2 * sqrt(max(r, c)) * NS5(u) + weight_decay * x)

    which is :class:`DistributedMuon` without votes; the factor makes the rms of an update 0.2 (Liu et al., 2025,
    arXiv 2502.16982, equation 4). Momenta of hidden matrices are the ``exp_avg`` of their state. The ranks of a sharded
    replica gather whole matrices in turns, one a rank at a time.

    Args:
        params: param groups as :func:`hf_dlion.hidden_matrices` makes them.
        lr: learning rate, as of AdamW.
        betas, eps: of AdamW.
        weight_decay: decoupled.
        hidden_betas: the decays of direction and momentum of hidden matrices.
        process_group, on_bad_gradient, check_replicas_steps: as in :class:`hf_dlion.optim.workers.WorkersOptimizer`.

    Raises:
        ValueError: an argument out of its range, no group of hidden matrices, or a parameter there that is none.
    """

    whole_parameters = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        hidden_betas: tuple[float, float] = (0.9, 0.95),
        **options: Unpack[WorkersOptions],
    ) -> None:
        self.hidden_betas = hidden_betas
        super().__init__(params, lr, weight_decay, rule="adamw", betas=betas, eps=eps, **options)
        self.check_hidden()

    @override
    def _step_by_rule(
        self,
        group: dict[str, Any],
        spans: Sequence[Span],
        parameters: Sequence[Tensor],
        means: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
    ) -> None:
        if not group[ORTHOGONAL]:
            super()._step_by_rule(group, spans, parameters, means, states)
            return
        directions = [move_momentum(mean, state["exp_avg"], group) for mean, state in zip(means, states, strict=True)]
        updates = self._updates(group, [span.parameter for span in spans], directions)
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.sub_(float(group["lr"]) * (update + group["weight_decay"] * parameter))

    def _updates(self, group: dict[str, Any], indices: Sequence[int], directions: Sequence[Tensor]) -> list[Tensor]:
        """Of hidden parameters of a group, flat, by their directions. Of shards, a collective over the replica."""
        assert self._plan is not None
        shards, everything = self._plan.shards, all_parameters(self)
        parameters = [everything[index] for index in indices]
        if shards is not None:
            found: list[Tensor] = []
            for start in range(0, len(indices), shards.size):
                some = slice(start, start + shards.size)
                shapes = [parameter.shape for parameter in parameters[some]]
                splits = [group[SPLIT]] * len(shapes)
                found += orthogonalize_shards(shards, directions[some], shapes, splits, _updates_into)
            return found
        wholes = [local(parameter) for parameter in parameters]
        return orthogonalize_directions(wholes, directions, [group[SPLIT]] * len(wholes), _updates_into)


def _updates_into(matrices: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """The orthogonalised matrices, at an rms of 0.2."""
    orthogonalize_into(matrices, outputs)
    for output in outputs:
        output *= UPDATE_RMS * max(output.shape) ** 0.5
