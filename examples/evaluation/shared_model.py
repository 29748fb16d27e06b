"""lm-eval over several processes, each with the whole model."""

from typing import Any

import torch.distributed as dist
from lm_eval.models.huggingface import HFLM

from .tasks_3shot.definitions import TaskError

# What lm-eval makes of a request: its texts, the tokens of the prompt, those of the continuation.
Request = tuple[tuple[str, str], list[int], list[int]]


class SharedModel(HFLM):
    """lm-eval's model, over several processes: each computes a share of the batches, and all have all answers.

    lm-eval spreads rows over ranks itself, and then every rank draws other shots than one process would. Here, to
    lm-eval every process is alone: it builds the same prompts. The batches are those of one process, too: with
    others, padding and hence rounding would differ.

    Args:
        model: on its device.
        tokenizer: the model's.
        rank: this process.
        workers: how many there are.
        options: of HFLM.
    """

    def __init__(self, model: Any, tokenizer: Any, rank: int, workers: int, **options: Any) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, **options)
        self.process_index = rank
        self.workers = workers
        self.asked = 0
        self.truncated = 0

    def _loglikelihood_tokens(self, requests: list[Request], **options: Any) -> list[tuple[float, bool]]:
        self.asked += len(requests)
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise TaskError(
                f"an answer has {longest} tokens, and the model takes {self.max_length}: prompts can be cut, answers "
                "cannot. Leave its task out of --tasks, or raise --max_length if the model has more positions."
            )
        length = self.max_length + 1  # the last token of the continuation is not fed to the model
        self.truncated += sum(len(prompt) + len(continuation) > length for _, prompt, continuation in requests)
        if self.workers == 1:
            return super()._loglikelihood_tokens(requests, **options)
        places = share(requests, int(self.batch_size), self.process_index, self.workers)
        answers = super()._loglikelihood_tokens([requests[i] for i in places], **options) if places else []
        parts: list[list[tuple[int, Any]]] = [[] for _ in range(self.workers)]
        dist.all_gather_object(parts, list(zip(places, answers, strict=True)))
        together = dict(pair for part in parts for pair in part)
        return [together[place] for place in range(len(requests))]


def share(requests: list[Request], batch_size: int, rank: int, workers: int) -> list[int]:
    """The places of this rank's requests: every `workers`-th batch, counted as HFLM makes them.

    HFLM computes continuations that differ in their last token at once, by the longest, and takes what is left from
    long to short.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, (_, prompt, continuation) in enumerate(requests):
        groups.setdefault((*prompt, *continuation[:-1]), []).append(place)

    def order(group: list[int]) -> tuple[int, tuple[int, ...]]:
        _, prompt, continuation = requests[max(group, key=lambda place: len(requests[place][2]))]
        return -len(prompt) - len(continuation), (*prompt, *continuation)

    ranked = sorted(groups.values(), key=order)
    batches = [ranked[start : start + batch_size] for start in range(0, len(ranked), batch_size)]
    return sorted(place for batch in batches[rank::workers] for group in batch for place in group)
