"""The packed shared-prefix batch and its log-probabilities."""

from posttrain.forest.logprobs import (
    hidden_states,
    token_logprobs,
    token_statistics,
    unrolled_hidden_states,
    unrolled_logprobs,
)
from posttrain.forest.tree import Forest, Row, grow, pack, share, split

__all__ = [
    "Forest",
    "Row",
    "grow",
    "hidden_states",
    "pack",
    "share",
    "split",
    "token_logprobs",
    "token_statistics",
    "unrolled_hidden_states",
    "unrolled_logprobs",
]
