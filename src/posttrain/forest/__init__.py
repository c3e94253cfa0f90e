"""The packed shared-prefix batch and its log-probabilities."""

from posttrain.forest.logprobs import token_logprobs, unrolled_logprobs
from posttrain.forest.tree import Forest, Row, grow, pack, split

__all__ = ["Forest", "Row", "grow", "pack", "split", "token_logprobs", "unrolled_logprobs"]
