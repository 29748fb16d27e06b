"""Which parameters of a model are hidden matrices, and which of those are several in one."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from .tensors import as_laid_out, flatten, memory_order

Split = tuple[int, ...]
"""The dimension in which a weight is cut, and the sizes of its parts; empty, if it is one matrix."""

ORTHOGONAL, SPLIT = "orthogonal", "split"

UPDATE_RMS = 0.2
"""Of an update before the learning rate; about that of AdamW's (Liu et al., 2025, arXiv 2502.16982, section 2.2)."""

_ALTERNATING = ("GptOssExperts", "OpenAIPrivacyFilterExperts")
"""Experts of transformers whose gate and up alternate, row by row."""

_CONVOLUTIONS = (nn.modules.conv._ConvNd,)

_IN_ADAPTERS = re.compile(r"\.(base_layer|original_module|modules_to_save\.[^.]+)$")
"""What PEFT puts behind the name of a layer that it wraps."""


def hidden_matrices(
    model: nn.Module,
    *,
    decayed: Container[str] | None = None,
    others: Iterable[str] = (),
    splits: Mapping[str, Sequence[int]] | None = None,
) -> list[dict[str, Any]]:
    """The param groups of a model for :class:`DistributedMuon` and :class:`GlobalMuon`.

    A hidden matrix is the weight of a linear layer, a convolution, an attention or a bank of experts that lies inside
    the network. Embeddings, the output head (tied or not; of a model of transformers, whatever is outside its base
    model), norms, biases and other parameters are not. Weights that are several matrices in one are cut: GPT-2's
    ``c_attn``, ``qkv_proj`` (with fewer key heads, too, as a configuration above it has them), ``Wqkv``,
    ``in_proj_weight``, ``gate_up_proj``, ``Wi``, experts. Those whose heads alternate (``query_key_value``, CodeGen's,
    GPTBigCode's), or whose gate and up do, stay whole; and so do those that are not three times as wide as their
    inputs, if no configuration tells of heads: say in ``splits`` how they are to be cut. A low-rank adapter's A and B
    are hidden matrices. The head of a model that is not of transformers, and has no ``get_output_embeddings``, cannot
    be told from a layer inside: name it in ``others``.

    Args:
        model: only parameters that require gradients are taken.
        decayed: names of the parameters that weight decay is for; None: those of two dimensions or more.
        others: names of parameters that are no hidden matrices, whatever they look like; as of ``named_parameters``.
        splits: by the last part of a linear layer's name, the sizes of the matrices in its weight, along its outputs.

    Returns:
        Groups of named parameters with the entries ``orthogonal`` and ``split``; those without decay have a
        ``weight_decay`` of 0.

    Raises:
        ValueError: the model has none of a name in ``others`` or ``splits``, or sizes do not add up to its outputs.
    """
    plain = _known({others} if isinstance(others, str) else set(others), model)
    base = _base_model(model)
    inside = {id(parameter) for parameter in base.parameters()}
    outside = {id(parameter) for parameter in _embeddings_and_head(model)}
    found = _splits_in(base, splits or {})
    groups: dict[Any, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        key = id(parameter)
        hidden = key in found and key in inside and key not in outside and name not in plain
        split = found[key] if hidden else ()
        decays = parameter.dim() > 1 if decayed is None else name in decayed
        group = groups.setdefault((not hidden, split, not decays), {"params": [], ORTHOGONAL: hidden, SPLIT: split})
        group["params"].append((name, parameter))
        if not decays:
            group["weight_decay"] = 0.0
    return [groups[key] for key in sorted(groups)]


def _splits_in(base: nn.Module, splits: Mapping[str, Sequence[int]]) -> dict[int, Split]:
    """By id, the parameters that are matrices, whatever their place."""
    modules, found, met = dict(base.named_modules()), dict[int, Split](), set[str]()
    for name, module in modules.items():
        attention, _, last = _IN_ADAPTERS.sub("", name).rpartition(".")
        named = last if last in splits or not _heads_alternate(modules[attention]) else ""
        for parameter, split in _matrices(named, module, _heads(name, modules), splits):
            found[id(parameter)] = split
        if _is_linear(module):
            met.add(last)
    if unknown := set(splits) - met:
        raise ValueError(
            f"splits has {', '.join(map(repr, sorted(unknown)))}, and the model has no linear layer of that name "
            "inside. It is the last part of a name of model.named_modules(), such as qkv_proj."
        )
    return found


def _known(others: set[str], model: nn.Module) -> set[str]:
    if unknown := others.difference(name for name, _ in model.named_parameters(remove_duplicate=False)):
        raise ValueError(
            f"others has {', '.join(map(repr, sorted(unknown)))}, and the model has no parameter of that name. Names "
            "are those of model.named_parameters(), such as head.weight."
        )
    return others


def matrices_of(weight: Tensor, split: Split) -> list[Tensor]:
    """The matrices in a weight: of a convolution, one that is flattened; of experts, one each.

    Views, if the weight is contiguous.
    """
    parts = weight.split(list(split[1:]), split[0]) if split else (weight,)
    if weight.dim() == 2:
        return list(parts)
    if split:  # experts, each of them a matrix, or several
        return [matrix for part in parts for matrix in part.unbind()]
    return [weight.flatten(1)]


def orthogonalize_directions(
    parameters: Sequence[Tensor],
    directions: Sequence[Tensor],
    splits: Sequence[Split],
    orthogonalize: Callable[[Sequence[Tensor], Sequence[Tensor]], None],
) -> list[Tensor]:
    """Orthogonalise the directions of hidden parameters; they are overwritten, or copied first.

    Args:
        parameters: for their shapes and memory orders.
        directions: float32, flat, in those orders.
        splits: which matrices are in each.
        orthogonalize: takes matrices, and where what becomes of each is written.

    Returns:
        The results, flat.
    """
    results, matrices = [], []
    for parameter, direction, split in zip(parameters, directions, splits, strict=True):
        direction = as_laid_out(direction, parameter.shape, memory_order(parameter))
        if direction.dim() > 2 and not split:  # a convolution, which is flattened
            direction = direction.contiguous()
        results.append(direction)
        matrices += matrices_of(direction, split)
    orthogonalize(matrices, matrices)
    return [flatten(result, memory_order(p)) for result, p in zip(results, parameters, strict=True)]


def move_momentum(gradient: Tensor, momentum: Tensor, group: dict[str, Any]) -> Tensor:
    """The direction of a hidden parameter, or of a part of it; moves its momentum on."""
    beta1, beta2 = group["betas"]
    direction = beta1 * momentum + (1 - beta1) * gradient
    momentum.copy_(beta2 * momentum + (1 - beta2) * gradient)
    return direction


def _check_split(weight: Tensor, split: Split) -> None:
    """Raise ValueError unless the weight can be cut so."""
    if weight.dim() < 2:
        raise ValueError(
            f"a parameter of shape {tuple(weight.shape)} in a group with orthogonal=True: only a matrix can be "
            "orthogonalised. Put it into a group with orthogonal=False, as hidden_matrices(model) does."
        )
    if split and weight.dim() > 3:
        raise ValueError(
            f"split={split} of a parameter of shape {tuple(weight.shape)}: only matrices, and banks of them with three "
            "dimensions, can be split. Leave it out: a convolution is one matrix."
        )
    if split and (split[0] >= weight.dim() or sum(split[1:]) != weight.shape[split[0]]):
        raise ValueError(
            f"split={split} of a parameter of shape {tuple(weight.shape)}: it is a dimension, and the sizes of the "
            "parts along it, which add up to that dimension."
        )


class HiddenMatricesMixin:
    """Of an optimizer whose param groups say which are hidden matrices; put it first among the bases.

    Attributes:
        hidden_betas: the decays of hidden matrices, where their group has none of its own.
    """

    hidden_betas: tuple[float, float]
    param_groups: list[dict[str, Any]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters. On all ranks alike, between two steps."""
        param_group.setdefault(ORTHOGONAL, False)
        param_group[SPLIT] = tuple(param_group.get(SPLIT, ()))
        if param_group[ORTHOGONAL]:
            param_group.setdefault("betas", self.hidden_betas)
        super().add_param_group(param_group)  # type: ignore[misc]

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError where a hyperparameter is out of its range, or a parameter is no matrix."""
        super().check_group(group)  # type: ignore[misc]
        if group[ORTHOGONAL] and isinstance(group["params"], list):  # a number, in a checkpoint
            for parameter in group["params"]:
                _check_split(parameter, group[SPLIT])

    def hyperparameters(self) -> tuple[str, ...]:
        """Names of the hyperparameters that must be the same on all ranks at every step."""
        return (*super().hyperparameters(), ORTHOGONAL, SPLIT)  # type: ignore[misc]

    def check_hidden(self) -> None:
        """Raise ValueError unless there are hidden matrices."""
        if not any(group[ORTHOGONAL] for group in self.param_groups):
            raise ValueError(
                "no param group has orthogonal=True, so nothing would be orthogonalised. Make the groups by "
                "hf_dlion.hidden_matrices(model), which finds the hidden matrices. If they come from there, none of "
                "the trainable parameters is one: take optim=dlion_mavo, DistributedLion."
            )


def _base_model(model: nn.Module) -> nn.Module:
    """What of a model is inside: of transformers' the base model, of one with adapters all but what is saved whole."""
    inner: Any = getattr(model, "module", model)  # of DistributedDataParallel
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    base = getattr(inner, "base_model", inner)
    return base if isinstance(base, nn.Module) else model


def _embeddings_and_head(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            yield from module.parameters()
        for getter in ("get_input_embeddings", "get_output_embeddings"):
            try:
                layer = getattr(module, getter, lambda: None)()
            except (NotImplementedError, AttributeError):
                continue  # not implemented for a model of transformers, or it was built without that layer
            if isinstance(layer, nn.Module):
                yield from layer.parameters()


def _matrices(
    name: str, module: nn.Module, heads: tuple[int, int] | None, splits: Mapping[str, Sequence[int]]
) -> Iterator[tuple[nn.Parameter, Split]]:
    """The weights of a layer that are matrices, each with its split."""
    kinds, layer = _kinds(module), cast(Any, module)
    if isinstance(module, _CONVOLUTIONS):
        yield layer.weight, ()
    elif isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is not None:
            yield module.in_proj_weight, (0, *[module.embed_dim] * 3)
        else:  # keys and values of other widths
            yield from ((weight, ()) for weight in (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight))
    elif any(kind.endswith("Experts") for kind in kinds):
        yield from _experts(module)
    elif _is_linear(module):
        outputs = 1 if "Conv1D" in kinds else 0  # transformers' Conv1D has its inputs first
        inside = layer.weight.shape
        sizes = splits.get(name) or _fused(name, inside[outputs], inside[1 - outputs], layer, heads)
        if sum(sizes) != inside[outputs]:
            raise ValueError(
                f"splits has {list(sizes)} for {name!r}, whose outputs are {inside[outputs]}: they do not add up."
            )
        yield layer.weight, (outputs, *sizes) if len(sizes) > 1 else ()


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or "Conv1D" in _kinds(module)


def _kinds(module: nn.Module) -> set[str]:
    """The names of its class and of those it comes from: fully_shard puts a class of its own in front."""
    return {kind.__name__ for kind in type(module).__mro__}


def _experts(module: nn.Module) -> Iterator[tuple[nn.Parameter, Split]]:
    """Banks ``[experts, ...]``; gate and up, in one weight beside one that leads down, are cut."""
    weights = {name: weight for name, weight in module.named_parameters(recurse=False) if weight.dim() == 3}
    kinds = _kinds(module)
    down = weights.get("down_proj")
    for name, weight in weights.items():
        split: Split = (0, len(weight))
        if name == "gate_up_proj" and down is not None and kinds.isdisjoint(_ALTERNATING):
            for outputs, width in ((1, down.shape[2]), (2, down.shape[1])):
                if weight.shape[outputs] == 2 * width and weight.shape[3 - outputs] == down.shape[outputs]:
                    split = (outputs, width, width)
                    break
        yield weight, split


def _fused(name: str, outputs: int, inputs: int, module: Any, heads: tuple[int, int] | None) -> Sequence[int]:
    """The sizes of the matrices in a layer's weight, along its outputs."""
    if name in ("gate_up_proj", "Wi") and outputs % 2 == 0:
        return [outputs // 2] * 2
    if name == "c_attn" and hasattr(module, "nx"):
        width = int(module.nx)
        return [width] * (outputs // width) if outputs % width == 0 else [outputs]
    if name not in ("qkv_proj", "Wqkv", "c_attn", "qkv"):
        return [outputs]
    if heads is None and outputs != 3 * inputs:
        return [outputs]
    queries, keys = heads or (1, 1)
    if outputs % (queries + 2 * keys):
        return [outputs]
    size = outputs // (queries + 2 * keys)
    return [queries * size, keys * size, keys * size]


def _heads_alternate(attention: nn.Module) -> bool:
    """Whether the rows of its fused weight are not all queries, then all keys and all values."""
    return "CodeGenAttention" in _kinds(attention) or getattr(attention, "multi_query", True) is False


def _heads(name: str, modules: Mapping[str, nn.Module]) -> tuple[int, int] | None:
    """Heads of queries and of keys, by the configuration nearest above a module; None if there is none."""
    while True:
        config = getattr(modules[name], "config", None)
        heads = getattr(config, "num_attention_heads", None)
        if isinstance(heads, int):
            keys = getattr(config, "num_key_value_heads", None)
            return heads, keys if isinstance(keys, int) else heads
        if not name:
            return None
        name = name.rpartition(".")[0]
