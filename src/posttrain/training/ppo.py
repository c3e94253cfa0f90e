"""Proximal policy optimisation with a critic: a token is worth what came of it beyond what was expected."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from posttrain.credit.batch import as_row, at_all, at_sampled
from posttrain.credit.gae import gae
from posttrain.credit.reinforce import token_rewards, whiten
from posttrain.forest import Forest, hidden_states
from posttrain.forest.attention import decoder
from posttrain.forest.logprobs import States
from posttrain.losses import policy_gradient, reduce_tokens
from posttrain.losses.reward import value as value_loss
from posttrain.models.disk import write_bytes
from posttrain.recipe.rl import Ppo
from posttrain.records import Rollout, Score, UserError
from posttrain.training.batch import Batch, Metrics, frozen
from posttrain.training.rollouts import RolloutMethod

CRITIC = "critic.safetensors"
"""In the folder of a ppo stage, beside its model: `weight` and `bias` of the critic on that model's hidden states."""
STEERING = 0.1
"""By how much the KL weight moves for a KL that is all of its target off."""
MOST = 0.2
"""A KL further off than this share of its target counts as this far."""


class PpoMethod(RolloutMethod):
    """PPO (Schulman et al., 1707.06347) as RLHF has it (Ouyang et al., 2203.02155; Ziegler et al., 1909.08593).

    The KL penalty is a reward of each token, the score one of the last; advantages are GAE's, whitened over the batch
    of rollouts. The critic is one linear layer on the policy's hidden states, and both losses train these.

    Departures: the critic begins at 0 everywhere, or as an earlier stage left it. Nothing is taken to come after a
    completion that was cut off, for its score is of what stands there. Means are over the tokens of the step, not of
    the micro-batch.
    """

    stage: Ppo
    always = True  # the critic learns from what is worth nothing too

    def __init__(self, stage: Ppo, *args: Any, **kwargs: Any) -> None:
        super().__init__(stage, *args, **kwargs)
        self.clip = {"clip_low": stage.clip_low, "clip_high": stage.clip_high, "ratio_cap": stage.ratio_cap}
        self.objective = partial(policy_gradient, **self.clip)
        self.kl_weight = stage.kl_weight
        model = decoder(self.policy.model)
        dtype = torch.promote_types(model.dtype, torch.float32)
        self.critic = nn.Linear(model.config.get_text_config().hidden_size, 1, dtype=dtype, device=model.device)
        nn.init.zeros_(self.critic.weight)
        nn.init.zeros_(self.critic.bias)

    def save(self, folder: Path) -> None:
        """Write the critic as `CRITIC` in a stage's folder.

        Raises:
            UserError: it cannot be written.
        """
        write_bytes(folder / CRITIC, save({name: t.detach().cpu() for name, t in self.critic.state_dict().items()}))

    def take(self, folder: Path) -> None:
        """Go on with the critic that an earlier stage left in its folder.

        Raises:
            UserError: there is none that fits this model.
        """
        try:
            self.critic.load_state_dict(load_file(folder / CRITIC))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UserError(f"{folder / CRITIC}: is no critic of this model ({error}); leave `critic` out") from error

    def parameters(self) -> dict[str, nn.Parameter]:
        return {f"critic.{name}": parameter for name, parameter in self.critic.named_parameters()}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, state = super().state()
        return tensors, state | {"kl_weight": self.kl_weight}

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        super().restore(tensors, state)
        self.kl_weight = state["kl_weight"]

    def forward(self, model: nn.Module, forest: Forest, states: States) -> Tensor:
        """[2, T], or [3, T] with entropies: log-probabilities first, last what the critic expects before each token."""
        hidden_TD = states(model, forest)
        outputs_KT = super().forward(model, forest, lambda *_: hidden_TD).view(-1, len(forest))
        values_N = self.critic(hidden_TD[forest.predicting_N].to(self.critic.weight.dtype)).squeeze(-1)
        values_T = outputs_KT.new_zeros(len(forest)).masked_scatter(
            forest.target_T, values_N.to(outputs_KT.device, outputs_KT.dtype)
        )
        return torch.cat([outputs_KT, values_T[None]])

    def credit(self, rollouts: Sequence[Rollout], scores: Sequence[Score]) -> list[list[float] | None]:
        stage = self.stage
        scored = [i for i, s in enumerate(scores) if s.value is not None]
        rows = [as_row(rollouts[i]) for i in scored]
        outputs = frozen(self.policy, self.forward, rows, stage.tokens_per_forward, hidden_states, world=self.world)
        penalties = self.penalties(self.kl_weight)
        self.values: list[Sequence[float] | None] = [None] * len(rollouts)
        self.returns: list[Sequence[float] | None] = [None] * len(rollouts)
        advantages = []
        for i, found_KT in zip(scored, outputs, strict=True):
            self.old[i], self.values[i] = found_KT[0].tolist(), found_KT[-1].tolist()
            score = scores[i].value or 0.0
            if rollouts[i].finish == "length":
                score -= stage.missing_eos_penalty
            # What was said to the model between its turns is no step of its own.
            earned = token_rewards(score, at_sampled(rollouts[i], penalties[i]))
            values = at_sampled(rollouts[i], self.values[i] or [])
            worth, returns = gae(earned, values, gamma=stage.gamma, lam=stage.gae_lambda)
            self.returns[i] = at_all(rollouts[i], returns)
            advantages.append(worth)
        self._tell([rollouts[i] for i in scored], scored)
        worths = {i: at_all(rollouts[i], worth) for i, worth in zip(scored, whiten(advantages), strict=True)}
        return [worths.get(i) for i in range(len(rollouts))]

    def _tell(self, rollouts: Sequence[Rollout], scored: Sequence[int]) -> None:
        """The share of the returns' variance that the critic explains; and the KL weight, which is then steered."""
        returns, values = (
            [v for r, i in zip(rollouts, scored, strict=True) for v in at_sampled(r, kept[i] or ())]
            for kept in (self.returns, self.values)
        )
        if len(returns) > 1 and (spread := statistics.variance(returns)):
            errors = [r - v for r, v in zip(returns, values, strict=True)]
            self.told["explained"] = 1 - statistics.variance(errors) / spread
        if self.reference is None:
            return
        self.told["kl_weight"] = self.kl_weight
        if self.stage.kl_target is not None and scored:
            whole = self.told["kl"] * sum(r.sampled for r in rollouts) / len(scored)
            off = whole / self.stage.kl_target - 1
            self.kl_weight *= 1 + STEERING * max(-MOST, min(MOST, off))

    def loss(self, batch: Batch, rows: Sequence[int], forest: Forest, outputs: Tensor) -> tuple[Tensor, Metrics]:
        stage, target_T, values_T = self.stage, forest.target_T, outputs[-1]
        loss_T, _, stats = self.policy_loss(batch, rows, forest, outputs)
        old_T, returns_T = (self.spread(kept, rows, forest).to(values_T.dtype) for kept in (self.values, self.returns))
        critic_T = value_loss(values_T, old_T, returns_T, target_T, clip=stage.value_clip)
        stats["value_loss"] = reduce_tokens(critic_T.detach(), target_T, batch.counts).item()
        return reduce_tokens(loss_T + stage.value_weight * critic_T, target_T, batch.counts), stats
