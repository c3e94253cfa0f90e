"""FlexAttention over a forest equals the segment-by-segment attention. On the CPU through PyTorch's own plain
implementation of the operator; the compiled kernels of a GPU are not run here."""

from __future__ import annotations

import random
import shutil
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_forest import random_forest
from tiny import tiny_model

from posttrain.forest import grow, hidden_states
from posttrain.forest.attention import Scoring, Tree
from posttrain.forest.flex import Flex, sees, walk

WINDOWS = (None, 1, 3, 8)


def dense(forest, window=None):
    """The definition, pair by pair: k is on q's path, and not after it, and inside the window."""
    segment = [i for i, s in enumerate(forest.segments) for _ in range(s.start, s.stop)]
    position = forest.position_T.tolist()
    paths = [set(forest.path(i)) for i in range(len(forest.segments))]
    T = range(len(forest))
    return torch.tensor(
        [[segment[k] in paths[segment[q]] and 0 <= position[q] - position[k] < (window or 10**9) for k in T] for q in T]
    )


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), window=st.sampled_from(WINDOWS))
def test_a_token_sees_its_path_and_nothing_else(seed, window):
    forest = random_forest(random.Random(seed), depth=6)
    at = torch.arange(len(forest))
    assert torch.equal(sees(forest, window)(at * 0, at * 0, at[:, None], at), dense(forest, window))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_walk_nests(seed):
    """Every segment has a number of its own; a subtree's numbers are an interval inside its parent's."""
    forest = random_forest(random.Random(seed), depth=6)
    enter, leave = walk(forest)
    assert sorted(enter) == list(range(len(forest.segments)))
    for i, s in enumerate(forest.segments):
        below = [j for j in range(len(forest.segments)) if i in forest.path(j)]
        assert sorted(enter[j] for j in below) == list(range(enter[i], leave[i]))
        if s.parent >= 0:
            assert enter[s.parent] < enter[i] < leave[i] <= leave[s.parent]


@pytest.fixture
def trainable(monkeypatch):
    """PyTorch refuses to train through FlexAttention on a CPU, for want of a fused kernel; its plain implementation
    has a gradient all the same."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        yield


def long_forest(seed=0):
    """Over several blocks of 128 tokens, so that some are empty, some full and some partly visible."""
    rng = random.Random(seed)
    parents, sizes = (-1, 0, 0, 1, 1, -1, 5), (150 + seed, 140, 60, 30, 10, 40, 20)
    nodes = [([rng.randrange(97) for _ in range(n)], [False] * n, p) for p, n in zip(parents, sizes, strict=True)]
    return grow(nodes, [2, 3, 4, 6])


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_values_and_gradients_equal_the_trees(trainable, window, softcap, sinks, kv_heads):
    forest = long_forest()
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    T = len(forest)
    q, k, v = normal(1, 4, T, 8), normal(1, kv_heads, T, 8), normal(1, kv_heads, T, 8)
    sink_H = normal(4) if sinks else None
    weight = torch.randn(1, 4, T, 8, generator=generator, dtype=torch.float64)
    inputs = [q, k, v, *([sink_H] if sinks else [])]
    results = []
    for layout in (Flex(forest), Tree(forest)):
        out = layout.attend(0, q, k, v, Scoring(0.5, window, softcap, sink_H))
        results.append([out, *torch.autograd.grad((out * weight).sum(), inputs)])
    for ours, oracle in zip(*results, strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-9, atol=1e-9)


def test_blocks_that_are_empty_are_skipped():
    """Two roots of 200 tokens: of the second's blocks only those it reaches into are left."""
    forest = grow([([1] * 200, [False] * 200, -1), ([2] * 200, [False] * 200, -1)], [0, 1])
    mask = Flex(forest).block_mask(None)
    blocks = -(-len(forest) // 128)
    seen = dense(forest)
    padded = torch.zeros(blocks * 128, blocks * 128, dtype=torch.bool)
    padded[: len(forest), : len(forest)] = seen
    work = padded.view(blocks, 128, blocks, 128).any(3).any(1)
    assert torch.equal(mask.to_dense()[0, 0].bool(), work)
    assert work.sum() < blocks * (blocks + 1) // 2  # a causal mask alone would leave more to do


def test_the_mask_is_made_once_a_forest():
    forest = long_forest()
    assert Flex(forest).block_mask(None) is Flex(forest).block_mask(None)
    assert Flex(forest).block_mask(20) is not Flex(forest).block_mask(None)


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2", "mistral"])
def test_a_whole_model_sees_no_difference(trainable, arch):
    model = tiny_model(arch, vocab=97)
    for seed in (0, 1):
        forest = random_forest(random.Random(seed))
        flex_TD = hidden_states(model, forest, Flex)
        torch.testing.assert_close(flex_TD, hidden_states(model, forest), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(shutil.which("c++") is None, reason="compiling the CPU kernel needs a C++ compiler")
def test_the_compiled_cpu_kernel_agrees():
    """Forward only: Inductor has no backward for it on a CPU. Shapes are dynamic, as on a GPU."""
    from posttrain.forest.flex import compiled

    flex = compiled()
    for seed in (0, 1):
        forest = long_forest(seed)
        T = len(forest)
        q, k, v = torch.randn(3, 1, 2, T, 16, generator=torch.Generator().manual_seed(seed)).unbind(0)
        with torch.no_grad():
            out = flex(q, k, v, block_mask=Flex(forest).block_mask(None), scale=0.25)
        want = Tree(forest).attend(0, q, k, v, Scoring(0.25))
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)


def test_a_pass_runs_where_the_model_is(monkeypatch):
    """No second device is here, so the model goes to `meta`, where a tensor left behind on the CPU is an error."""
    # Transformers reads a value off the positions here, which `meta` does not have.
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    model = tiny_model(vocab=97).to("meta")
    forest = random_forest(random.Random(1))
    assert hidden_states(model, forest).device.type == "meta"
    assert forest.ids_T.device.type == "cpu"
