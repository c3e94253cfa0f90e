"""A language model that is a table of next-token probabilities, so that all it can say can be written down."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.data.chat import Rendered
from posttrain.data.prepare import Prepared
from posttrain.forest import Forest, hidden_states, pack, token_logprobs
from posttrain.models.policy import Policy
from posttrain.recipe.blocks import Sampling
from posttrain.records import Example, Ledger, Rollout, Score
from posttrain.rewards.protocol import Scorer
from posttrain.training.loop import trained

PROMPT = (99,)
Ids = tuple[int, ...]


class Table(nn.Module):
    """The hidden state after a prefix is the prefix's own unit vector, and the output layer is the table."""

    def __init__(self, vocabulary: int, longest: int, end: int | None) -> None:
        super().__init__()
        self.end, self.longest = end, longest
        going = [i for i in range(vocabulary) if i != end]
        prefixes = [p for length in range(longest) for p in itertools.product(going, repeat=length)]
        self.node = {prefix: i for i, prefix in enumerate(prefixes)}
        self.completions = [
            (*prefix, token)
            for prefix in prefixes
            for token in range(vocabulary)
            if token == end or len(prefix) == longest - 1
        ]
        self.table = nn.Linear(len(prefixes), vocabulary, bias=False, dtype=torch.float64)
        nn.init.zeros_(self.table.weight)
        # As a config counts: no layers below the output.
        sizes = {"hidden_size": len(prefixes), "intermediate_size": 0, "num_hidden_layers": 0, "num_attention_heads": 1}
        sizes |= {"vocab_size": vocabulary, "model_type": "toy", "tie_word_embeddings": False}
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**sizes))
        self.dtype, self.device = torch.float64, torch.device("cpu")

    def get_output_embeddings(self) -> nn.Linear:
        return self.table

    def states(self, forest: Forest) -> Tensor:
        """[T, nodes], in place of `hidden_states`."""
        ids, nodes = forest.ids_T.tolist(), [0] * len(forest)
        for start, stop in forest.spans:
            for t in range(start, stop - 1):
                nodes[t] = self.node[tuple(ids[start : t + 1])]
        return nn.functional.one_hot(torch.tensor(nodes), len(self.node)).to(self.dtype)

    @torch.no_grad()
    def logps(self, ids: Ids) -> list[float]:
        rows = self.table.weight.t().log_softmax(-1)
        return [rows[self.node[ids[:t]], token].item() for t, token in enumerate(ids)]

    def probabilities(self) -> Tensor:
        """Of each completion."""
        return torch.tensor([sum(self.logps(ids)) for ids in self.completions], dtype=torch.float64).exp()


class ToyPolicy(Policy):
    def run(self, compute: Callable[..., Tensor], forest: Forest, *args: Any, more: bool = False) -> Tensor:
        def states(model: Table, forest: Forest) -> Tensor:
            return model.states(forest)

        args = tuple(states if a is hidden_states else a for a in args)
        return compute(self.model, forest, *args, *([states] if compute is token_logprobs else []))


def toy(vocabulary: int, longest: int, end: int | None = 0, spread: float = 0.0) -> ToyPolicy:
    """Starts as a uniform distribution, or one whose logits are `spread` apart."""
    model = Table(vocabulary, longest, end)
    with torch.no_grad():
        model.table.weight.normal_(0, 1, generator=torch.Generator().manual_seed(0)).mul_(spread)
    return ToyPolicy(model, None, "toy", "toy")  # type: ignore[arg-type]


class ToySampler:
    """Draws evenly: of n completions each one comes as often as its probability says, to within one."""

    def __init__(self, policy: ToyPolicy) -> None:
        self.policy = policy

    def __call__(self, prompts: Sequence[Example], n: int, sampling: Sampling, seed: int) -> Any:
        model: Table = self.policy.model  # type: ignore[assignment]
        rng = torch.Generator().manual_seed(seed % 2**31)
        said = {ids: tuple(model.logps(ids)) for ids in model.completions}
        until, digest = model.probabilities().cumsum(0), self.policy.digest()
        rollouts = []
        for group, example in enumerate(prompts):
            at = (torch.arange(n) + torch.rand(1, generator=rng, dtype=torch.float64)) / n * until[-1]
            for i in torch.searchsorted(until, at).clamp(max=len(until) - 1).tolist():
                ids = model.completions[i]
                finish: Any = "stop" if ids[-1] == model.end else "length"
                rollouts.append(Rollout(example, group, PROMPT, ids, said[ids], "", finish, digest))
        return rollouts, Ledger(generated_tokens=sum(len(r.ids) for r in rollouts))


def toy_data() -> Prepared:
    return Prepared(((Rendered(Example("toy"), PROMPT),),), (1.0,), {})


def toy_scorer(reward: Callable[[Ids], float]) -> Scorer:
    return lambda rollouts: [Score(reward(r.ids), "correct") for r in rollouts]


def learn(method: Any, policy: ToyPolicy, steps: int, lr: float) -> None:
    """Adam whose rate falls to 0, on the loss of the method's batches."""
    parameters = list(trained(policy, method).values())
    adam = torch.optim.Adam(parameters, lr)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for step in range(steps):
        batch = method.batch(step)
        adam.zero_grad()
        if batch.rows:
            forest = pack(batch.rows)
            outputs = policy.run(method.forward, forest, hidden_states)
            loss, _ = method.loss(batch, range(len(batch.rows)), forest, outputs)
            loss.backward()
            adam.step()
        falling.step()
