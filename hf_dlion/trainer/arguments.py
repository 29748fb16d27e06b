"""Training arguments: the names that ``optim=`` takes, and the options of their methods.

Extends ``TrainingArguments`` by fields and ``__post_init__``. transformers 5 turns ``optim`` into an enum there, so a
name of ours stands aside while the parent runs.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence, Set
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from ..bits.orthogonal import NS_STEPS
from ..checkpoint.workers import WORLD_SIZE_POLICIES
from ..optim.agreement import ON_BAD_GRADIENT
from ..optim.local_steps import OUTER_AGGREGATIONS
from ..optim.muon import RESTS
from ..optim.virtual import ADVERSARIES
from ..optim.workers import check_known
from ..wire.exchange import AGGREGATIONS, EXCHANGES, TIES
from .methods import METHODS, Method

logger = logging.getLogger(__name__)

_FOREIGN = ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_target_modules")

_OUTER = ("outer_learning_rate", "outer_momentum", "local_fragments", "local_delay", "outer_aggregation")

_NOT_INNER = {
    "lomo": "it steps during backward, and keeps no gradient",
    "layerwise": "it steps during backward, and keeps no gradient",
    "schedule_free": "its parameters are others for training than for evaluation",
}
"""Parts of names of transformers whose optimizers make no local steps, and why."""

_NAMES = "; ".join(f"`{name}`: {method.summary}" for name, method in METHODS.items())


@dataclass
class DLionArgumentsMixin:
    """The fields of Distributed Lion, for any subclass of ``TrainingArguments``; put it first among the bases.

    With one of our names as ``optim``, ``average_tokens_across_devices`` is turned off: every worker's gradient is the
    mean over its own batch, as the method has it, and a worker with more tokens does not weigh more. ``optim_args``
    then has keywords of the optimizer: ``"betas=(0.9,0.98),tie=alternate"``. What transformers' optimizers take and the
    method does not (``adam_beta1``, ``optim_target_modules``) is refused where it is not left at its default.
    """

    # A string: HfArgumentParser would admit only the names of transformers into its enum.
    optim: str = field(
        default=TrainingArguments.default_optim,
        metadata={
            "help": f"The optimizer. Distributed Lion and its relatives: {_NAMES.replace('%', '%%')}. Or any name that "
            "transformers knows, such as `adamw_torch`; those train as ever, with averaged gradients."
        },
    )
    # Lion's betas are fields of their own: Adam's default of 0.999 for the second is not Lion's.
    lion_beta1: float = field(
        default=0.9,
        metadata={
            "help": "The decay of the direction that is voted on, in dlion, dmuon (of all that votes) and glion; of "
            "hidden matrices in gmuon."
        },
    )
    lion_beta2: float = field(
        default=0.99,
        metadata={
            "help": "The decay of the momentum that a worker keeps, in dlion and glion, and in dmuon for embedding, "
            "norms and biases that vote. In runs of a few hundred steps, 0.95 may be better."
        },
    )
    muon_beta2: float = field(
        default=0.95,
        metadata={"help": "The decay of the momentum of hidden matrices in dmuon and gmuon; lion_beta1 is the other."},
    )
    muon_ns_steps: int = field(
        default=5,
        metadata={
            "help": "Steps of dmuon's orthogonalisation: 5, Muon's; or 3, with coefficients for as few: faster "
            "where matrices are wide and a step has few tokens.",
            "choices": list(NS_STEPS),
        },
    )
    muon_rest: str = field(
        default="vote",
        metadata={
            "help": "What dmuon does with embedding, head, norms and biases: `vote`, on Lion's direction; or "
            "`average`: gradients are averaged in 32 bits, and AdamW steps with adam_beta1, adam_beta2 and "
            "adam_epsilon. In finetuning that trained better. It is cheap if they are a small part of the model.",
            "choices": list(RESTS),
        },
    )
    vote_tie: str = field(
        default="auto",
        metadata={
            "help": "What a majority vote of an even number of workers does where it is split: `zero` leaves the "
            "parameter (but for its decay), as the paper does; `alternate` takes alternating signs, and sends one bit "
            "less per parameter on the way back; `auto`: `alternate` for dmuon and with local_steps, else `zero`.",
            "choices": ["auto", *TIES],
        },
    )
    vote_exchange: str = field(
        default="auto",
        metadata={
            "help": "How votes travel: `gather`, everyone counts all of them; `sharded`, each rank counts its part; "
            "`hierarchical`, they are counted on each machine first; `auto`, the one that sends fewer bytes, between "
            "machines if there are several with several workers each.",
            "choices": list(EXCHANGES),
        },
    )

    norm_gradients: bool = field(
        default=False,
        metadata={
            "help": "Of dlion, dsignum and dmuon: divide the gradient of each parameter by its root mean square, so "
            "that all steps weigh the same in a momentum. In place of clipping: max_grad_norm is 0 then."
        },
    )
    overlap_votes: bool | None = field(
        default=None,
        metadata={
            "help": "Of dlion, dsignum and dmuon: send votes while backward still computes other gradients. It changes "
            "no bit, and needs gradients that nothing changes after backward: max_grad_norm 0, or norm_gradients. By "
            "default on CPUs; `true` on GPUs as well, where dmuon's directions may differ in their last bits, and over "
            "NCCL nothing else may call collectives between backward and step; `false` nowhere."
        },
    )
    signum_momentum: float = field(default=0.9, metadata={"help": "Signum's decay of the momentum that is voted on."})
    base_rule: str = field(
        default="sgd",
        metadata={
            "help": "How terngrad, graddrop and dgc step with their averaged gradient: `sgd`, with momentum, or "
            "`adamw`.",
            "choices": ["sgd", "adamw"],
        },
    )
    sgd_momentum: float = field(default=0.9, metadata={"help": "Momentum of that SGD; dgc has it on the workers."})
    terngrad_clip: float = field(
        default=2.5, metadata={"help": "Standard deviations to which terngrad clips each layer's gradient; 0: no clip."}
    )
    drop_share: float = field(
        default=0.96, metadata={"help": "Share of the entries that graddrop and dgc do not send at a step."}
    )
    dgc_warmup_steps: int = field(default=0, metadata={"help": "Steps in which dgc goes from a quarter sent to that."})
    dgc_clip: float = field(
        default=1.0, metadata={"help": "Norm to which dgc clips gradients, over the root of the workers; 0: no clip."}
    )

    gradient_votes: str | None = field(
        default=None,
        metadata={
            "help": "With an optimizer of transformers: workers send the signs of their gradients, with noise, and the "
            "optimizer gets what they decide in place of averaged gradients: `avg`, the mean of the signs; `mavo`, "
            "their majority.",
            "choices": list(AGGREGATIONS),
        },
    )
    local_steps: int = field(
        default=0,
        metadata={
            "help": "Steps that each worker makes by itself, by whatever optimizer `optim` names, from one vote to the "
            "next; the votes are on how far the workers have come. 0: none, and an exchange at every step."
        },
    )
    outer_learning_rate: float = field(
        default=1.0, metadata={"help": "With local_steps, the share of the voted displacement by which all move."}
    )
    outer_momentum: float = field(
        default=0.0,
        metadata={"help": "With local_steps, the Nesterov momentum of those moves; 0: none. DiLoCo's is 0.9."},
    )
    local_fragments: int = field(
        default=1,
        metadata={"help": "With local_steps, parts of the parameters that vote in turn, each every so many steps."},
    )
    local_delay: int = field(
        default=0,
        metadata={
            "help": "With local_steps, steps that the workers make while a vote is on its way; at most local_steps "
            "over local_fragments."
        },
    )
    outer_aggregation: str = field(
        default="mavo",
        metadata={
            "help": "With local_steps, how displacements become one: `mavo`, a majority vote on their signs, or `avg`, "
            "the average of their signs, both times their mean magnitude; or `mean`, their average, in 32 bits.",
            "choices": list(OUTER_AGGREGATIONS),
        },
    )

    on_bad_gradient: str = field(
        default="abstain",
        metadata={
            "help": "What becomes of a step where a worker's gradient has a NaN or Inf: `abstain`, that worker has no "
            "vote in it and keeps its momentum, and `bad_gradients` in the log counts it; or `raise`, all ranks stop.",
            "choices": list(ON_BAD_GRADIENT),
        },
    )
    check_replicas_steps: int = field(
        default=100,
        metadata={"help": "Compare a checksum of the parameters over the ranks every so many steps; 0: never."},
    )
    resume_world_size_policy: str = field(
        default="mean",
        metadata={
            "help": "Resuming with another number of workers, what each one's momentum is: `mean`, that of all old "
            "ones; `reset`, zero; `error`: do not resume.",
            "choices": list(WORLD_SIZE_POLICIES),
        },
    )
    virtual_workers: int = field(
        default=1,
        metadata={
            "help": "Workers inside one process, to see what so many would do without having them. Batch size and "
            "`gradient_accumulation_steps` are those of each worker, as with processes."
        },
    )
    adversaries: int = field(default=0, metadata={"help": "How many of the virtual workers send what is not theirs."})
    adversary: str = field(
        default="flip",
        metadata={
            "help": "What those send: `flip`, the negative of their gradient, or `random`, its magnitudes under random "
            "signs.",
            "choices": list(ADVERSARIES),
        },
    )

    def __init_subclass__(cls, **options: Any) -> None:
        """Raise TypeError where the mixin comes after what it extends, or there is no ``__init__`` for all fields."""
        super().__init_subclass__(**options)
        before = cls.__mro__[: cls.__mro__.index(DLionArgumentsMixin)] if DLionArgumentsMixin in cls.__mro__ else ()
        for base in before:
            if issubclass(base, TrainingArguments) and not issubclass(base, DLionArgumentsMixin):
                raise TypeError(
                    f"class {cls.__name__} has {base.__name__} before DLionArgumentsMixin, which would not see the "
                    f"arguments. Put the mixin first: class {cls.__name__}(DLionArgumentsMixin, {base.__name__})."
                )

    def __new__(cls, *args: Any, **options: Any) -> Any:
        """Raise TypeError where a subclass was not made a dataclass, and would take the mixin's fields only."""
        if cls.__init__ is DLionArgumentsMixin.__init__ and issubclass(cls, TrainingArguments):
            theirs = next(base for base in cls.__mro__ if not issubclass(base, DLionArgumentsMixin))
            raise TypeError(
                f"class {cls.__name__} is not a dataclass of its own, so it would take none of the arguments of "
                f"{theirs.__name__}. Write @dataclass above it."
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        name = str(getattr(self.optim, "value", self.optim))
        self._check_virtual_workers(name)
        if name not in METHODS:
            self.optim = _known(name)
            super().__post_init__()  # type: ignore[misc]
            self._take_gradient_votes()
            self._check_local_steps(name)
            if self.local_steps:
                self.take_method()
            return
        self.optim = OptimizerNames.ADAMW_TORCH
        super().__post_init__()  # type: ignore[misc]
        self.optim = name
        self.take_method()

    def set_optimizer(
        self, name: str | OptimizerNames = TrainingArguments.default_optim, *args: Any, **options: Any
    ) -> Any:
        """As the parent, with our names too."""
        chosen = str(getattr(name, "value", name))
        ours = chosen in METHODS
        self._check_virtual_workers(chosen)
        super().set_optimizer(OptimizerNames.ADAMW_TORCH if ours else _known(chosen), *args, **options)  # type: ignore[misc]
        if ours:
            self.optim = chosen
        if ours or self.local_steps:
            self.take_method()
        return self

    def take_method(self) -> None:
        """Check what goes with our methods and with local steps, and set what follows. Once more does no harm.

        Raises:
            ValueError: an option that the method does not have, or a value that it does not take.
        """
        self.average_tokens_across_devices = False
        name = str(getattr(self.optim, "value", self.optim))
        self._check_virtual_workers(name)
        self._check_method()
        self._check_local_steps(name)
        if name not in METHODS:
            votes = {"vote_tie", "vote_exchange"} if self.outer_aggregation != "mean" else set()
            self._check_unread({"on_bad_gradient", "check_replicas_steps", "resume_world_size_policy", *votes})
            return
        self._check_options(METHODS[name])
        if self.norm_gradients and "norm_gradients" in METHODS[name].reads(self):
            self.max_grad_norm = 0.0

    def _take_gradient_votes(self) -> None:
        """Check what goes with ``gradient_votes``, and set what follows from it."""
        if self.gradient_votes is None:
            return
        self.average_tokens_across_devices = False
        check_known("vote_exchange", self.vote_exchange, EXCHANGES)
        check_known("on_bad_gradient", self.on_bad_gradient, ON_BAD_GRADIENT)
        for name in ("deepspeed", "adversaries", "local_steps"):
            if getattr(self, name, None):
                raise ValueError(
                    f"gradient_votes={self.gradient_votes!r} with {name}={getattr(self, name)!r}: votes on gradients "
                    "are a hook of DDP or FSDP2, of every worker and at every step. Leave one of the two out."
                )
        self._check_unread({"vote_exchange", "on_bad_gradient"})

    def _check_virtual_workers(self, name: str) -> None:
        if self.gradient_votes is not None:
            check_known("gradient_votes", self.gradient_votes, AGGREGATIONS)
            if name in METHODS:
                raise ValueError(
                    f"gradient_votes={self.gradient_votes!r} with optim={name!r}: that method exchanges votes or codes "
                    "itself. Leave gradient_votes out, or take an optim of transformers, such as adamw_torch."
                )
        known = name in METHODS or self.gradient_votes is not None or self.local_steps
        if self.virtual_workers < 1 or (self.virtual_workers > 1 and not known):
            raise ValueError(
                f"virtual_workers={self.virtual_workers} with optim={name!r}: there is at least one worker, and "
                f"several in one process are for {', '.join(METHODS)}, for local_steps and for gradient_votes."
            )
        if self.virtual_workers > 1 and getattr(self, "train_sampling_strategy", None) == "batch_rebalance":
            raise ValueError(
                f"train_sampling_strategy='batch_rebalance' with virtual_workers={self.virtual_workers}: it deals rows "
                "out to processes by itself. Take another one."
            )

    def _check_local_steps(self, name: str) -> None:
        """Raise ValueError where local steps cannot be, or are not and an option of theirs is given."""
        if type(self.local_steps) is not int or self.local_steps < 0:
            raise ValueError(f"local_steps={self.local_steps!r}: it is a number of steps, or 0.")
        defaults = {each.name: each.default for each in fields(DLionArgumentsMixin)}
        changed = [f"{one}={getattr(self, one)!r}" for one in _OUTER if getattr(self, one) != defaults[one]]
        if changed and not self.local_steps:
            raise ValueError(
                f"{changed[0]} without local_steps would change nothing. Leave it out, or give local_steps."
            )
        if self.local_steps and (kind := next((kind for kind in _NOT_INNER if kind in name), None)):
            raise ValueError(
                f"local_steps={self.local_steps} with optim={name!r}: {_NOT_INNER[kind]}. Take another optimizer, such "
                "as gmuon or adamw_torch."
            )
        check_known("outer_aggregation", self.outer_aggregation, OUTER_AGGREGATIONS)

    def _check_options(self, method: Method) -> None:
        """What the method does not read, and is not left at its default: refused, or said, if another of ours would."""
        read = method.reads(self)
        if self.local_steps and self.outer_aggregation != "mean":
            read |= {"vote_tie", "vote_exchange"}
        method.keywords(self)
        self._check_unread(read, _FOREIGN)

    def _check_unread(self, read: Set[str], refused: Sequence[str] = ()) -> None:
        """Say which options of methods are not left at their defaults, and are not read."""
        defaults = {each.name: each.default for each in fields(self)}
        changed = [name for name in defaults if getattr(self, name) != defaults[name] and name not in read]
        own = [each.name for each in fields(DLionArgumentsMixin)]
        of_methods = {name for each in METHODS.values() for name in each.reads(self)} & {*own}
        takes = f"optim={self.optim!r} takes {', '.join(sorted(read & {*of_methods, *refused})) or 'none of these'}"
        for name in refused:
            if name in changed:
                raise ValueError(f"{name}={getattr(self, name)!r} would change nothing: {takes}. Leave it out.")
        unread = [f"{name}={getattr(self, name)!r}" for name in own if name in of_methods and name in changed]
        if unread and self.process_index == 0:  # type: ignore[attr-defined]
            logger.warning("%s would be for other methods, and changes nothing: %s.", ", ".join(unread), takes)

    def _check_method(self) -> None:
        for given, value, known in (
            ("muon_ns_steps", self.muon_ns_steps, NS_STEPS),
            ("muon_rest", self.muon_rest, RESTS),
            ("vote_tie", self.vote_tie, ("auto", *TIES)),
            ("vote_exchange", self.vote_exchange, EXCHANGES),
            ("base_rule", self.base_rule, ("sgd", "adamw")),
            ("adversary", self.adversary, ADVERSARIES),
            ("on_bad_gradient", self.on_bad_gradient, ON_BAD_GRADIENT),
            ("resume_world_size_policy", self.resume_world_size_policy, WORLD_SIZE_POLICIES),
        ):
            check_known(given, value, known)
        if self.adversaries and not 0 < self.adversaries <= self.virtual_workers > 1:
            raise ValueError(
                f"adversaries={self.adversaries} with virtual_workers={self.virtual_workers}: adversaries are some of "
                "several virtual workers."
            )
        if getattr(self, "fp16", False) and self.virtual_workers > 1:
            raise ValueError(
                f"fp16 with virtual_workers={self.virtual_workers}: one gradient scaler cannot serve several workers. "
                "Use bf16=True."
            )
        if getattr(self, "fsdp", None) and getattr(self, "use_cpu", False):
            raise ValueError(
                f"optim={self.optim!r} with fsdp on CPUs: accelerate shards on GPUs only. Leave one of the two out."
            )
        if getattr(self, "deepspeed", None):
            raise ValueError(
                f"optim={self.optim!r} with deepspeed: no worker would hold the whole model and its own gradient. "
                "Leave that argument out; a model that does not fit a GPU is sharded by FSDP2, with fsdp and a "
                "parallelism_config."
            )

    @property
    def gradients_stay_local(self) -> bool:
        """Whether gradients stay on their worker: with a method of this package, or with local steps."""
        return self.optim in METHODS or self.local_steps > 0

    votes = gradients_stay_local  # its former name


@dataclass
class DLionTrainingArguments(DLionArgumentsMixin, TrainingArguments):
    """``TrainingArguments`` that know Distributed Lion and its relatives by name: ``optim="dlion_mavo"``, say.

    Everything else is as in transformers, from Python, by ``HfArgumentParser`` and in ``--help``.
    """


def _known(name: str) -> Any:
    theirs = [member.value for member in OptimizerNames]
    if name in theirs:
        return name
    close = [known for known in METHODS if known.startswith(f"{name}_")]  # dmuon is no name, and dmuon_mavo is one
    close = close or difflib.get_close_matches(name, [*METHODS, *theirs], n=1)
    raise ValueError(
        f"optim={name!r} is not known.{f' Did you mean {close[0]!r}?' if close else ''} Methods of hf_dlion: "
        f"{', '.join(METHODS)}. Optimizers of transformers: {', '.join(theirs)}."
    )
