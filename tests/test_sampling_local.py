"""The engine writes what one sequence at a time would write, and says what it thought of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from tiny import ARCHS, tiny_policy
from transformers import GenerationConfig

from posttrain.forest import Row, pack, token_logprobs
from posttrain.forest.attention import decoder
from posttrain.recipe.blocks import Lora, Sampling
from posttrain.records import Example, UserError
from posttrain.sampling.choose import choose, cut, uniforms
from posttrain.sampling.local import LocalSampler


@dataclass
class Words:
    """A renderer that takes the prompt's content as it is."""

    tokenizer: object

    def prompt_ids(self, example: Example) -> tuple[int, ...]:
        return tuple(self.tokenizer(example.prompt[0]["content"], add_special_tokens=False)["input_ids"])

    def decode(self, ids) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def ask(*texts: str) -> list[Example]:
    return [Example(f"t:{i}", ({"role": "user", "content": text},)) for i, text in enumerate(texts)]


PROMPTS = ask(
    "The quick brown fox",
    "The quick brown fox jumps over",
    "What is the sum of 12",
    "T",
    "The quick brown fox jumps over the lazy dog, and the dog does not mind. The quick brown fox",
    "What is the sum of 12",
)


def sharp(arch: str, **config):
    """A tiny policy whose next token is not all but uniform."""
    policy = tiny_policy(arch, tie_word_embeddings=False, **config)
    with torch.no_grad():
        decoder(policy.model).get_output_embeddings().weight.mul_(40)
    return policy


@pytest.mark.parametrize("arch", ARCHS)
def test_greedy_is_generate_token_for_token(arch):
    policy = sharp(arch)
    sampler = LocalSampler(policy, Words(policy.tokenizer), rows=4)
    rollouts, _ = sampler(PROMPTS, 1, Sampling(temperature=0, max_new_tokens=24), seed=0)
    eos = sorted(policy.eos_ids)
    for rollout in rollouts:
        out = policy.model.generate(
            torch.tensor([rollout.prompt_ids]),
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=24, eos_token_id=eos, pad_token_id=eos[0], bos_token_id=None
            ),
        )
        assert out[0, len(rollout.prompt_ids) :].tolist() == list(rollout.ids)


@pytest.mark.parametrize("arch", ARCHS)
def test_log_probabilities_are_the_trainers(arch):
    policy = sharp(arch)
    sampling = Sampling(temperature=0.8, max_new_tokens=20)
    rollouts, _ = LocalSampler(policy, Words(policy.tokenizer), rows=9)(PROMPTS, 3, sampling, seed=1)
    forest = pack([Row(r.prompt_ids, r.ids, (True,) * len(r.ids)) for r in rollouts])
    logps_T = token_logprobs(policy.model, forest, temperature=0.8)
    torch.testing.assert_close(
        logps_T[forest.target_T], forest.spread([r.logps for r in rollouts])[forest.target_T], atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2"])
def test_a_completion_does_not_depend_on_its_neighbours(arch):
    """Sampled alone, in another batch width, or one naive forward pass at a time: the same tokens."""
    policy = sharp(arch)
    words, sampling = Words(policy.tokenizer), Sampling(temperature=1.5, max_new_tokens=12, top_p=0.95, min_p=0.01)
    want = [r.ids for r in LocalSampler(policy, words)(PROMPTS, 4, sampling, seed=7)[0]]
    for rows in (1, 4, 11):
        assert [r.ids for r in LocalSampler(policy, words, rows)(PROMPTS, 4, sampling, seed=7)[0]] == want
    naive = LocalSampler(policy, words)
    naive._decode = naive._decode_naively
    assert [r.ids for r in naive(PROMPTS, 4, sampling, seed=7)[0]] == want
    assert len(set(want)) > len(PROMPTS)


@pytest.mark.parametrize("speculate", [0, 3])
def test_rows_that_end_at_any_time_are_filled_again(speculate):
    """A third of all tokens end a completion, many at once: rows move, rooms grow and shrink, prompts come and go."""
    policy = sharp("qwen3", adapter=Lora(r=2))
    policy.__dict__["eos_ids"] = frozenset(range(0, 320, 3))
    words, sampling = Words(policy.tokenizer), Sampling(temperature=2.0, max_new_tokens=40, speculate=speculate)
    prompts = PROMPTS * 3 + ask("The lazy dog does not mind. " * 6, "T")
    naive = LocalSampler(policy, words)
    naive._decode = naive._decode_naively
    want, _ = naive(prompts, 3, sampling, seed=2)
    assert {len(r.ids) for r in want} >= {1, 2, 3}
    for rows in (2, 7, 20, 128):
        assert [r.ids for r in LocalSampler(policy, words, rows)(prompts, 3, sampling, seed=2)[0]] == [
            r.ids for r in want
        ]


def test_lengths_stop_and_context():
    policy = sharp("llama")
    words = Words(policy.tokenizer)
    rollouts, ledger = LocalSampler(policy, words)(PROMPTS, 8, Sampling(max_new_tokens=40), seed=3)
    for r in rollouts:
        ended = r.ids[-1] in policy.eos_ids
        assert r.finish == ("stop" if ended else "length")
        assert ended or len(r.ids) == 40
        assert not set(r.ids[:-1]) & policy.eos_ids
        assert len(r.logps) == len(r.ids)
        assert r.weights == policy.digest()
    assert ledger.generated_tokens == sum(len(r.ids) for r in rollouts)
    assert ledger.prompt_tokens < sum(len(words.prompt_ids(e)) for e in PROMPTS)
    assert ledger.prompt_tokens + ledger.cached_tokens == 8 * sum(len(words.prompt_ids(e)) for e in PROMPTS)
    with pytest.raises(UserError, match="no room"):
        LocalSampler(policy, words)(ask("a1 " * 200), 1, Sampling(), seed=0)
    near = LocalSampler(policy, words)(ask("a" * 250), 1, Sampling(max_new_tokens=64), seed=0)[0][0]
    assert len(near.ids) + len(near.prompt_ids) <= policy.context


def test_stop_strings_end_and_are_cut():
    policy = sharp("llama")
    words = Words(policy.tokenizer)
    sampling = Sampling(max_new_tokens=40)
    plain = LocalSampler(policy, words)(PROMPTS, 2, sampling, seed=3)[0]
    stop = plain[0].text[5:7]
    stopped = LocalSampler(policy, words)(PROMPTS, 2, sampling.model_copy(update={"stop": (stop,)}), seed=3)[0]
    for a, b in zip(plain, stopped, strict=True):
        assert b.text == a.text.split(stop)[0]
        assert stop in a.text or b.ids == a.ids


def test_draws_are_distributed_as_the_probabilities():
    logits_V = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])
    uniform = torch.cat([uniforms(0, g, 0, 100) for g in range(200)])
    ids, logps = choose(logits_V.expand(len(uniform), -1), uniform, Sampling(temperature=0.7))
    p = (logits_V / 0.7).softmax(0)
    counts = Counter(ids.tolist())
    for token in range(4):
        # five standard deviations of a binomial share
        assert abs(counts[token] / len(ids) - p[token]) < 5 * (p[token] * (1 - p[token]) / len(ids)) ** 0.5
    torch.testing.assert_close(logps, p.log()[ids])


@pytest.mark.parametrize("vocabulary", [5, 128, 300, 1024])
@pytest.mark.parametrize("cuts", [{}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.05}])
def test_a_draw_by_blocks_is_the_plain_inverse(vocabulary, cuts):
    torch.manual_seed(0)
    logits_BV, uniform_B = 3 * torch.randn(500, vocabulary), torch.rand(500, dtype=torch.float64)
    sampling = Sampling(temperature=0.9, **cuts)
    ids_B, logps_B = choose(logits_BV, uniform_B, sampling)
    logps_BV = (logits_BV / 0.9).log_softmax(-1)
    torch.testing.assert_close(logps_B, logps_BV.gather(1, ids_B[:, None]).squeeze(1))
    cdf_BV = cut(logps_BV.double().exp(), sampling).cumsum(-1)
    want_B = torch.searchsorted(cdf_BV, uniform_B[:, None] * cdf_BV[:, -1:], right=True).squeeze(1)
    assert (ids_B != want_B).sum() == 0


def test_edges_of_the_draw_never_give_an_impossible_token():
    p = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    for u, want in ((0.0, 1), (0.499, 1), (0.5, 3), (1 - 1e-12, 3), (1.0, 3)):
        ids, _ = choose(p.log(), torch.tensor([u], dtype=torch.float64), Sampling())
        assert ids.item() == want


def test_cuts_keep_what_they_say():
    p = torch.tensor([[0.5, 0.05, 0.25, 0.2]])
    assert (cut(p, Sampling(top_k=2)) > 0).tolist() == [[True, False, True, False]]
    assert (cut(p, Sampling(top_p=0.7)) > 0).tolist() == [[True, False, True, False]]
    assert (cut(p, Sampling(top_p=0.76)) > 0).tolist() == [[True, False, True, True]]
    assert (cut(p, Sampling(min_p=0.3)) > 0).tolist() == [[True, False, True, True]]
    assert (cut(p, Sampling(top_p=1e-9)) > 0).tolist() == [[True, False, False, False]]
    assert torch.equal(cut(p, Sampling()), p)


def test_an_adapter_changes_what_is_written():
    policy = sharp("llama", adapter=Lora(r=2))
    words, sampling = Words(policy.tokenizer), Sampling(temperature=0, max_new_tokens=16)
    before = LocalSampler(policy, words)(PROMPTS, 1, sampling, seed=0)[0]
    with torch.no_grad():
        for p in policy.parameters().values():
            p.normal_(std=0.5)
    after = LocalSampler(policy, words)(PROMPTS, 1, sampling, seed=0)[0]
    assert [r.ids for r in before] != [r.ids for r in after]
    assert before[0].weights != after[0].weights
