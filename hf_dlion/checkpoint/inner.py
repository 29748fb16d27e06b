"""The state of an inner optimizer (``optim.local_steps``), in the part of its worker.

Tensors stand beside those of the worker, under ``inner.<parameter>.<name>``; numbers and the like, by the same names,
in the metadata of the file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .manifest import ELSEWHERE, CheckpointError

PREFIX = "inner."

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
                tensors[key] = value.contiguous()
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


def load_inner(inner: Optimizer, parts: Sequence[Any]) -> None:
    """Take over what it had.

    Args:
        inner: whose state becomes that; its param groups become copies.
        parts: open, of one worker, or of several, whose mean it becomes; none: it starts anew. Where something cannot
            be averaged (a quantised state), it becomes that of the first.
    """
    kinds = {part.get_slice(key).get_dtype() for part in parts for key in _tensors(part)}
    sources = parts if kinds <= _AVERAGED else parts[:1]
    state: dict[int, dict[str, Any]] = {}
    for key in dict.fromkeys(key for part in sources for key in _tensors(part)):
        held = [part.get_tensor(key) for part in sources if key in _tensors(part)]
        index, name = _place(key)
        state.setdefault(index, {})[name] = held[0] if len(held) == 1 else torch.stack(held).mean(0)
    for part in reversed(sources):
        for key, value in _others(part).items():
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
