"""What torch names otherwise, or lacks, in versions before 2.13; and what it does not say."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor


def all_gather_single(
    parts: Tensor, part: Tensor, group: dist.ProcessGroup | None = None, async_op: bool = False
) -> dist.Work | None:
    """As torch.distributed's, which is ``all_gather_into_tensor`` before 2.13."""
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(parts, part, group=group, async_op=async_op)


def time_limit(group: dist.ProcessGroup) -> timedelta | None:
    """How long a collective of this group may take; None where torch does not say."""
    backends: list[Any] = [group._get_backend(device) for device in getattr(group, "_device_types", [])]
    limits = [getattr(getattr(backend, "options", None), "_timeout", None) for backend in backends]
    return next((limit for limit in limits if limit is not None), None)


def group_store(group: dist.ProcessGroup) -> Any:
    """The store of a process group, over a connection of its own.

    Args:
        group: the default group; older torch cannot say what another's store is.

    Returns:
        A ``Store``; None where torch cannot make a second connection, as in 2.6.
    """
    own: Any = getattr(group, "get_group_store", dist.distributed_c10d._get_default_store)
    store = own()
    return store.clone() if hasattr(store, "clone") else None


def group_count() -> int:
    """Of how many process groups this rank is a member."""
    return len(dist.distributed_c10d._world.pg_names)
