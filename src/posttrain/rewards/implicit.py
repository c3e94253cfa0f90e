"""The reward that a policy implies: by how much likelier it makes an answer than its reference does."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from posttrain.data.chat import Renderer
from posttrain.forest import Row, token_logprobs
from posttrain.models.policy import Policy
from posttrain.records import Ledger, UserError
from posttrain.rewards.protocol import Scorer
from posttrain.rewards.rows import TOKENS, Rows, by_rows, graded, reader, same_tokens


def implicit_scorer(
    policy: Policy, reference: Policy, renderer: Renderer, *, beta: float, tokens: int = TOKENS
) -> Scorer:
    """beta log(pi / ref) of an answer, nats times beta: what DPO trains a policy to make the reward (Rafailov et al.,
    2305.18290, eq. 5, which leaves out a term of the prompt alone). Its parts at each token are a process reward
    (Yuan et al., 2412.01981). Of an episode it is the sum over what the model wrote, not over what tools said.

    Args:
        policy, reference: a model and what it was trained from, of one tokenizer.
        renderer: of the model whose answers are scored.

    Raises:
        UserError: the two have different tokenizers, or cannot read these answers (see `Rows`).
    """
    check_tokens(policy, reference)
    asked = [reader(model, partial(token_logprobs, model.model), tokens, logits=True) for model in (policy, reference)]

    def ratios(rows: Sequence[Row], costs: list[Ledger]) -> list[list[float]]:
        ours, theirs = (ask(rows, costs) for ask in asked)
        return [[beta * (p - q) for p, q in zip(*row, strict=True)] for row in zip(ours, theirs, strict=True)]

    return by_rows(Rows(policy, renderer, None, ended=False), ratios, lambda values: graded(sum(values), 0.0))


def check_tokens(policy: Policy, reference: Policy) -> None:
    """Raises UserError where the two have different tokenizers, for a log-ratio is of the same tokens."""
    if not same_tokens(policy.tokenizer, reference.tokenizer):
        raise UserError(
            f"{policy.source} and {reference.source}: have different tokenizers, so their log-probabilities are of "
            "different tokens; name a model and the one it was trained from"
        )
