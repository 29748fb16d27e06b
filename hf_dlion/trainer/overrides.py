"""What it takes to go with a Trainer that overrides methods which transformers has on the class."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MethodType
from typing import Any

from torch import Tensor

from ..optim.hidden import ORTHOGONAL, SPLIT


class on_class_too:
    """A method that can be called on the class as well, which it then has in place of the instance.

    transformers' ``get_optimizer_cls_and_kwargs`` is static; that of sentence-transformers needs its instance.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.__func__, self.__doc__ = function, function.__doc__

    def __get__(self, instance: Any, owner: type) -> Any:
        return MethodType(self.__func__, owner if instance is None else instance)


def split_by_hidden(groups: Iterable[Any], hidden: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Param groups, cut so that each has hidden matrices of one kind, or none.

    Args:
        groups: with parameters, or names and parameters; or these alone.
        hidden: as of ``hidden_matrices``; parameters in none of these are no hidden matrices.
    """
    kinds: dict[int, tuple[bool, Any]] = {}
    for group in hidden:
        kinds |= {id(_parameter(one)): (group[ORTHOGONAL], group[SPLIT]) for one in group["params"]}
    cut: list[dict[str, Any]] = []
    groups = list(groups)
    for group in groups if isinstance(groups[0], Mapping) else [{"params": groups}]:
        parts: dict[tuple[bool, Any], list[Any]] = {}
        for one in group["params"]:
            parts.setdefault(kinds.get(id(_parameter(one)), (False, ())), []).append(one)
        rest = {name: value for name, value in group.items() if name != "params"}
        cut += [{"params": ones, ORTHOGONAL: kind, SPLIT: split, **rest} for (kind, split), ones in parts.items()]
    return cut


def _parameter(one: Any) -> Tensor:
    return one[1] if isinstance(one, tuple) else one
