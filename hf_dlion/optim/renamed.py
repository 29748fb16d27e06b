"""Keyword arguments that have a new name, and are still taken by the old one."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def renamed_keywords(**names: str) -> Callable[[F], F]:
    """Take keyword arguments by their former names, with a FutureWarning.

    Args:
        names: the new name of each, by the former one.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def wrapper(*args: Any, **keywords: Any) -> Any:
            for former in names.keys() & keywords.keys():
                if names[former] in keywords:
                    raise TypeError(f"{former} and {names[former]} were given, and are one argument by two names.")
                warnings.warn(f"{former} is now {names[former]}.", FutureWarning, stacklevel=2)
                keywords[names[former]] = keywords.pop(former)
            return function(*args, **keywords)

        return wrapper  # type: ignore[return-value]

    return decorate
