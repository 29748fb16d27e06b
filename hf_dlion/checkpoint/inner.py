"""The state of an inner optimizer (``optim.local_steps``), in the part of its worker.

Tensors stand beside those of the worker, under ``inner.<parameter>.<name>``; numbers and the like, by the same names,
in the metadata of the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..optim.tensors import local, placed_as
from .manifest import ELSEWHERE, CheckpointError

PREFIX = "inner."
Held = Callable[[Sequence[Any], str, int], Tensor]

_AVERAGED = {"F16", "BF16", "F32", "F64"}


def inner_state(inner: Optimizer) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Its tensors, and the metadata with the rest.

    Raises:
        CheckpointError: it keeps something for a parameter that is neither.
    """
    tensors: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    for index, state in inner.state_dict()["state"].items():
        for name, value in state.items():
            key = f"{PREFIX}{index}.{name}"
            if isinstance(value, Tensor):
                tensors[key] = local(value).contiguous()
            elif value is None or isinstance(value, (bool, int, float, str)):
                others[key] = value
            else:
                raise CheckpointError(
                    f"the inner optimizer, {type(inner).__name__}, keeps a {type(value).__name__} as {name} of "
                    f"parameter {index}, and what can be saved is tensors and numbers. Take another inner optimizer."
                )
    return tensors, {PREFIX: json.dumps(others)}


def check_inner(part: Any, parameters: int) -> None:
    """Raise CheckpointError unless what an open part has of an inner optimizer is of so many parameters."""
    try:
        keys = [*_tensors(part), *_others(part)]
        wrong = [key for key in keys if not 0 <= _place(key)[0] < parameters]
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"the state of the inner optimizer is not valid ({error}). {ELSEWHERE}") from error
    if wrong:
        raise CheckpointError(
            f"the state of the inner optimizer has {wrong[0]}, of {parameters} parameters. {ELSEWHERE}"
        )


def load_inner(inner: Optimizer, workers: Sequence[Sequence[Any]], held: Held) -> None:
    """Take over what it had.

    Args:
        inner: whose state becomes that; its param groups become copies.
        workers: the open parts of one worker, or of several, whose mean it becomes; none: it starts anew. Where
            something cannot be averaged (a quantised state), it becomes that of the first.
        held: of the parts of a worker, a key and the index of its parameter: what this rank holds of that tensor.
    """
    kinds = {part.get_slice(key).get_dtype() for parts in workers for part in parts for key in _tensors(part)}
    sources = workers if kinds <= _AVERAGED else workers[:1]
    parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key in dict.fromkeys(key for parts in sources for key in _tensors(parts[0])):
        index, name = _place(key)
        found = [held(parts, key, index) for parts in sources if key in _tensors(parts[0])]
        # A tensor of safetensors is a mapping of the file, which may not outlive the training.
        value = found[0].clone() if len(found) == 1 else torch.stack(found).mean(0)
        whole = value.shape != local(parameters[index]).shape
        state.setdefault(index, {})[name] = value if whole else placed_as(parameters[index], value)
    for parts in reversed(sources):
        for key, value in _others(parts[0]).items():
            index, name = _place(key)
            state.setdefault(index, {})[name] = value
    inner.load_state_dict({"state": state, "param_groups": inner.state_dict()["param_groups"]})


def _tensors(part: Any) -> list[str]:
    return [key for key in part.keys() if key.startswith(PREFIX)]  # noqa: SIM118


def _others(part: Any) -> dict[str, Any]:
    return dict(json.loads((part.metadata() or {}).get(PREFIX, "{}")))


def _place(key: str) -> tuple[int, str]:
    """The index of the parameter, and the name."""
    index, name = key.removeprefix(PREFIX).split(".", 1)
    return int(index), name
