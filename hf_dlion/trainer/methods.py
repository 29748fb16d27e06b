"""The methods by the names that ``optim=`` takes. A new method is a file in ``optim/``, and an entry here."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer

from ..optim.dgc import DeepGradientCompression
from ..optim.dlion import DistributedLion
from ..optim.gadamw import GlobalAdamW
from ..optim.glion import GlobalLion
from ..optim.gmuon import GlobalMuon
from ..optim.graddrop import GradDrop
from ..optim.local_steps import LocalSteps
from ..optim.muon import DistributedMuon
from ..optim.signum import DistributedSignum
from ..optim.terngrad import TernGrad
from ..optim.workers import WorkersOptimizer, members_of
from ..wire.groups import Group

_REST = "rest"
"""Decides what the other keywords are, so only ``muon_rest`` sets it."""


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
        """The keyword arguments of ``optimizer``, but for the parameters and their weight decay.

        Those that ``arguments.optim_args`` has take the place of those from the other arguments.

        Raises:
            ValueError: it has others, or values of another kind.
        """
        own = self.options(arguments)
        given = _keywords_in(arguments.optim_args)
        if _REST in given:
            raise ValueError(
                f"optim_args has {_REST}={given[_REST]!r}: it decides which options there are. Use muon_rest."
            )
        for name, value in given.items():
            if name not in own or not _alike(value, own[name]):
                known = ", ".join(f"{known}={default!r}" for known, default in own.items() if known != _REST)
                raise ValueError(
                    f"optim_args has {name}={value!r}; optim={arguments.optim!r} takes {known} there, or values like "
                    "these. What else there is has arguments of its own: see --help."
                )
        return {"lr": arguments.learning_rate, **self.fixed, **own, **given}

    def reads(self, arguments: Any) -> set[str]:
        """Names of the arguments that its options come from."""
        reader = _Reader(arguments)
        self.options(reader)
        return reader.names


class _Reader:
    """Arguments that note which of them are read."""

    def __init__(self, arguments: Any) -> None:
        self.arguments, self.names = arguments, set[str]()

    def __getattr__(self, name: str) -> Any:
        self.names.add(name)
        return getattr(self.arguments, name)


def _keywords_in(text: str | None) -> dict[str, Any]:
    """``"betas=(0.9, 0.98), tie=alternate"`` as keywords; a bare word is a string."""
    try:
        call = ast.parse(f"f({text or ''})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("not only keywords")
        return {str(keyword.arg): _value(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"optim_args={text!r} cannot be read ({error}). It is name=value, separated by commas, with values as in "
            "Python: betas=(0.9,0.98),tie=alternate"
        ) from error


def _value(node: ast.expr) -> Any:
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


def _alike(value: Any, default: Any) -> bool:
    """Whether both are numbers, strings, booleans, or as many numbers; of None, whether the value is a boolean."""
    if isinstance(default, tuple):
        return isinstance(value, (tuple, list)) and len(value) == len(default) and all(map(_alike, value, default))
    if default is None:  # neither yes nor no, as overlap_votes
        return isinstance(value, bool)
    if isinstance(default, (str, bool)):
        return isinstance(value, type(default))
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _vote_options(arguments: Any, tie: str = "zero") -> dict[str, Any]:
    """With what ``auto`` is for this method."""
    given = arguments.vote_tie
    return {
        "tie": tie if given == "auto" else given,
        "exchange": arguments.vote_exchange,
        "norm_gradients": arguments.norm_gradients,
        "overlap": arguments.overlap_votes,
    }


def _lion_options(arguments: Any) -> dict[str, Any]:
    return {"betas": (arguments.lion_beta1, arguments.lion_beta2)}


def _adam_options(arguments: Any) -> dict[str, Any]:
    return {"betas": (arguments.adam_beta1, arguments.adam_beta2), "eps": arguments.adam_epsilon}


def _muon_options(arguments: Any) -> dict[str, Any]:
    hidden = {
        "hidden_betas": (arguments.lion_beta1, arguments.muon_beta2),
        "ns_steps": arguments.muon_ns_steps,
    }
    if arguments.muon_rest == "average":
        return {_REST: "average", **_adam_options(arguments), **hidden}
    return _lion_options(arguments) | hidden


def _rule_options(arguments: Any) -> dict[str, Any]:
    rule = arguments.base_rule
    return {"rule": rule, **(_adam_options(arguments) if rule == "adamw" else {"momentum": arguments.sgd_momentum})}


METHODS: dict[str, Method] = {
    "dlion_mavo": Method(
        DistributedLion,
        "Distributed Lion, majority vote: 1 bit up; a learning rate 3 to 10 times below AdamW's, and a weight decay as "
        "many times above",
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
        "Distributed Muon, majority vote on orthogonalised directions: 1 bit up; AdamW's weight decay, and a learning "
        "rate from AdamW's up to 20 times that",
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
            "momentum": arguments.sgd_momentum,  # on the workers, whatever the rule
        },
    ),
}


def local_steps_options(arguments: Any) -> dict[str, Any]:
    """The keyword arguments of ``LocalSteps``, but for the inner optimizer and the workers."""
    return {
        "every": arguments.local_steps,
        "outer_lr": arguments.outer_learning_rate,
        "outer_momentum": arguments.outer_momentum,
        "fragments": arguments.local_fragments,
        "delay": arguments.local_delay,
        "aggregation": arguments.outer_aggregation,
        "tie": "alternate" if arguments.vote_tie == "auto" else arguments.vote_tie,
        "exchange": arguments.vote_exchange,
        "on_bad_gradient": arguments.on_bad_gradient,
        "check_replicas_steps": arguments.check_replicas_steps,
    }


def in_local_steps(made: Callable[..., Optimizer], options: dict[str, Any]) -> Callable[..., LocalSteps]:
    """What makes one worker's optimizer with local steps, from what makes its inner one."""

    def make(params: Any, process_group: Group = None, **keywords: Any) -> LocalSteps:
        return LocalSteps(made(params, **keywords), process_group=process_group, **options)

    return make


def method_of(made: type) -> Method | None:
    """The method that makes such optimizers; None, where the class is not of this package."""
    return next((method for base in made.__mro__ for method in METHODS.values() if method.optimizer is base), None)


def name_of(optimizer: Any) -> str | None:
    """The name of the method that an optimizer has, wherever it was made; None, if it is not of this package.

    With local steps, that of the inner one.
    """
    for worker in members_of(optimizer)[:1]:
        chosen = worker.inner or worker
        for base in type(chosen).__mro__:
            for name, method in METHODS.items():
                if method.optimizer is base and all(getattr(chosen, key) == v for key, v in method.fixed.items()):
                    return name
    return None
