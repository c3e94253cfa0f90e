"""Running out of memory on the CPU: told in plain words, or the same work again in smaller passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from posttrain.records import Failure

Found = TypeVar("Found")
ONEDNN = "could not create a primitive"
"""How oneDNN says that it found no memory for a product's code."""
FEWER = "Lower max_new_tokens, n or batch_size (on_policy.prompts, for pairs), or tokens_per_forward"
"""What to do where rows are sampled, or a reference says what it thinks of them."""


class OutOfMemory(Failure):
    """What was to be computed does not fit."""


@contextmanager
def enough_memory(what: str, advice: str) -> Iterator[None]:
    """Raises OutOfMemory where memory ends inside."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        if ONEDNN in str(error):  # what it could not make once it may refuse for ever, however much memory is free
            torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
        raise OutOfMemory(f"out of memory {what} ({error}). {advice}") from error


def halving(
    run: Callable[[int], Found], tokens: int, smallest: int | None, what: str, advice: str, warn: Callable[[str], None]
) -> tuple[Found, int]:
    """`run(tokens)`, or of the half, the quarter and so on where memory ends; with the tokens that did.

    Where oneDNN finds none for the code of a product, PyTorch makes its products with another library from then on,
    here as in ATen's own answer to it: such a step is the same but for rounding.

    Raises:
        OutOfMemory: with less than `smallest` tokens too; at once where that is None.
    """
    while True:
        onednn = torch.backends.mkldnn.enabled
        try:
            with enough_memory(f"in {what}, in passes of {tokens} tokens", advice):
                return run(tokens), tokens
        except OutOfMemory:
            lost = onednn and not torch.backends.mkldnn.enabled
            if smallest is None or (tokens < smallest and not lost):
                raise
        if lost:
            warn(f"out of memory in {what}: again without oneDNN, the same but for rounding")
        else:
            tokens //= 2
            warn(f"out of memory in {what}: again in passes of {tokens} tokens")


def out_of_memory(error: BaseException) -> bool:
    """Whether that is what was wrong. PyTorch has a type for it on the GPU only."""
    said = "can't allocate memory", "bad_alloc", ONEDNN
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in said)
