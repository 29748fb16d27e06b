"""The parameters that the benchmarks update."""

from __future__ import annotations


def gpt2_shapes(hidden: int, layers: int, vocab: int, positions: int = 1024) -> list[tuple[int, ...]]:
    """The parameters of a GPT-2 with tied embeddings."""
    block = [(hidden,), (hidden,), (hidden, 3 * hidden), (3 * hidden,), (hidden, hidden), (hidden,)]
    block += [(hidden,), (hidden,), (hidden, 4 * hidden), (4 * hidden,), (4 * hidden, hidden), (hidden,)]
    return [(vocab, hidden), (positions, hidden), *(block * layers), (hidden,), (hidden,)]
