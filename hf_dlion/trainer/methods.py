"""The methods by the names that ``optim=`` takes. A new method is a file in ``optim/``, and an entry here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..optim.dgc import DeepGradientCompression
from ..optim.dlion import DistributedLion
from ..optim.gadamw import GlobalAdamW
from ..optim.glion import GlobalLion
from ..optim.gmuon import GlobalMuon
from ..optim.graddrop import GradDrop
from ..optim.muon import DistributedMuon
from ..optim.signum import DistributedSignum
from ..optim.terngrad import TernGrad
from ..optim.workers import WorkersOptimizer


@dataclass(frozen=True)
class Method:
    """What a name stands for.

    Attributes:
        optimizer: the class.
        summary: a line for ``--help``.
        fixed: keyword arguments that belong to the name.
        options: the keyword arguments that come from the training arguments (``DLionArgumentsMixin``).
        takes_hidden_matrices: whether it needs to know the hidden matrices of the model.
    """

    optimizer: type[WorkersOptimizer]
    summary: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    options: Callable[[Any], dict[str, Any]] = lambda arguments: {}
    takes_hidden_matrices: bool = False

    def keywords(self, arguments: Any) -> dict[str, Any]:
        """The keyword arguments of ``optimizer``, but for the parameters and their weight decay."""
        return {"lr": arguments.learning_rate, **self.fixed, **self.options(arguments)}


def _vote_options(arguments: Any, tie: str = "zero") -> dict[str, Any]:
    """With what ``auto`` is for this method."""
    given = arguments.vote_tie
    return {
        "tie": tie if given == "auto" else given,
        "exchange": arguments.vote_exchange,
        "norm_gradients": arguments.norm_gradients,
    }


def _lion_options(arguments: Any) -> dict[str, Any]:
    return {"betas": (arguments.lion_beta1, arguments.lion_beta2)}


def _muon_options(arguments: Any) -> dict[str, Any]:
    return {**_lion_options(arguments), "hidden_betas": (arguments.lion_beta1, arguments.muon_beta2)}


def _adam_options(arguments: Any) -> dict[str, Any]:
    return {"betas": (arguments.adam_beta1, arguments.adam_beta2), "eps": arguments.adam_epsilon}


def _rule_options(arguments: Any) -> dict[str, Any]:
    return {"rule": arguments.base_rule, "momentum": arguments.sgd_momentum, **_adam_options(arguments)}


METHODS: dict[str, Method] = {
    "dlion_mavo": Method(
        DistributedLion,
        "Distributed Lion, majority vote: 1 bit up",
        {"aggregation": "mavo"},
        lambda arguments: _lion_options(arguments) | _vote_options(arguments),
    ),
    "dlion_avg": Method(
        DistributedLion,
        "Distributed Lion, average of the signs: 1 bit up",
        {"aggregation": "avg"},
        lambda arguments: _lion_options(arguments) | _vote_options(arguments),
    ),
    "dsignum_mavo": Method(
        DistributedSignum,
        "Distributed Signum, majority vote: 1 bit up",
        {"aggregation": "mavo"},
        lambda arguments: {"momentum": arguments.signum_momentum, **_vote_options(arguments)},
    ),
    "dsignum_avg": Method(
        DistributedSignum,
        "Distributed Signum, average of the signs: 1 bit up",
        {"aggregation": "avg"},
        lambda arguments: {"momentum": arguments.signum_momentum, **_vote_options(arguments)},
    ),
    "dmuon_mavo": Method(
        DistributedMuon,
        "Distributed Muon, majority vote on orthogonalised directions: 1 bit up",
        {"aggregation": "mavo"},
        lambda arguments: _muon_options(arguments) | _vote_options(arguments, "alternate"),
        takes_hidden_matrices=True,
    ),
    "dmuon_avg": Method(
        DistributedMuon,
        "Distributed Muon, average of the signs of orthogonalised directions: 1 bit up",
        {"aggregation": "avg"},
        lambda arguments: _muon_options(arguments) | _vote_options(arguments, "alternate"),
        takes_hidden_matrices=True,
    ),
    "glion": Method(GlobalLion, "Lion on the averaged gradient: 32 bits", {}, _lion_options),
    "gadamw": Method(GlobalAdamW, "AdamW on the averaged gradient: 32 bits", {}, _adam_options),
    "gmuon": Method(
        GlobalMuon,
        "Muon on the averaged gradient, AdamW for the rest: 32 bits",
        {},
        lambda arguments: {
            "betas": (arguments.adam_beta1, arguments.adam_beta2),
            "eps": arguments.adam_epsilon,
            "hidden_betas": (arguments.lion_beta1, arguments.muon_beta2),
        },
        takes_hidden_matrices=True,
    ),
    "terngrad": Method(
        TernGrad,
        "ternary gradients, SGD or AdamW: 2 bits up",
        {},
        lambda arguments: {"clip": arguments.terngrad_clip, "seed": arguments.seed, **_rule_options(arguments)},
    ),
    "graddrop": Method(
        GradDrop,
        "the largest entries of the gradient, the rest kept, SGD or AdamW",
        {},
        lambda arguments: {"drop": arguments.drop_share, **_rule_options(arguments)},
    ),
    "dgc": Method(
        DeepGradientCompression,
        "Deep Gradient Compression: the largest entries, with momentum corrected",
        {},
        lambda arguments: {
            "drop": arguments.drop_share,
            "warmup_steps": arguments.dgc_warmup_steps,
            "clip": arguments.dgc_clip,
            **_rule_options(arguments),
        },
    ),
}
