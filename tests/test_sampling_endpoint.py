"""Rollouts over HTTP from a server that speaks vLLM's and SGLang's protocols and really samples, with a tiny model of
its own that it loads from the folder it is given. No vLLM and no SGLang was run against this code."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_policy
from tiny_runs import RENDERER, SEED, asked, grpo, stage_of

from posttrain.forest import Row, pack, token_logprobs
from posttrain.models.policy import Policy
from posttrain.recipe.blocks import Lora, Sampling
from posttrain.recipe.rl import Endpoint
from posttrain.records import Example, Failure, UserError, derive
from posttrain.sampling import endpoint
from posttrain.sampling.endpoint import EndpointSampler
from posttrain.sampling.local import LocalSampler
from posttrain.training.loop import train

PLAIN = Sampling(max_new_tokens=6)
N = 3
Fault = Callable[[BaseHTTPRequestHandler, Any], Any]


class Ids:
    """A renderer for prompts that are token ids already."""

    def prompt_ids(self, example: Example) -> tuple[int, ...]:
        return tuple(example.meta["ids"])

    def decode(self, ids) -> str:
        return RENDERER.decode(ids)


class Fake:
    """The server's side: its model, what it was told to load, and what it does wrong."""

    def __init__(self, policy: Policy, reports: str = "raw") -> None:
        self.policy, self.reports = policy, reports
        self.loaded: dict[str, str] = {}  # name -> folder
        self.version = "default"
        self.seen: list[tuple[str, Any]] = []
        self.faults: list[tuple[str, Fault]] = []
        self.lock = threading.Lock()

    def read(self, folder: str) -> None:
        stored = {k: v for file in Path(folder).glob("*.safetensors") for k, v in load_file(file).items()}
        with torch.no_grad():
            for name, p in self.policy.parameters().items():
                p.copy_(stored[name.replace(".default.", ".")])

    def draw(self, ids: list[int], n: int, sampling: Sampling, seed: int):
        example = Example("asked", meta={"ids": ids})
        rollouts, _ = LocalSampler(self.policy, Ids())([example], n, sampling, seed)
        return [(r.ids, self.logps(r, sampling), r.finish, r.text) for r in rollouts]

    def logps(self, r, sampling: Sampling) -> list[float]:
        if self.reports == "cut" and sampling.top_k == 1:
            return [0.0] * len(r.ids)
        temperature = 1.0 if self.reports == "raw" else sampling.temperature or 1.0
        row = Row(r.prompt_ids, r.ids, (True,) * len(r.ids))
        with torch.no_grad():
            return token_logprobs(self.policy.model, pack([row]), temperature)[-len(r.ids) :].tolist()

    def answer(self, path: str, body: Any) -> Any:
        match path:
            case "/v1/models":
                return {"data": [{"id": "base"}, *({"id": n, "root": f} for n, f in self.loaded.items())]}
            case "/v1/load_lora_adapter" | "/load_lora_adapter":
                if body["lora_name"] in self.loaded:
                    return 400, "already been loaded"
                self.read(body["lora_path"])
                self.loaded[body["lora_name"]] = body["lora_path"]
                return "Success: added" if path.startswith("/v1") else {"success": True}
            case "/v1/unload_lora_adapter" | "/unload_lora_adapter":
                del self.loaded[body["lora_name"]]
                return "Success: removed"
            case "/update_weights_from_disk":
                self.read(body["model_path"])
                self.version = body["weight_version"]
                return {"success": True, "message": "ok"}
            case "/v1/completions":
                if body["model"] not in self.loaded:
                    return 404, f"The model `{body['model']}` does not exist."
                keys = ("temperature", "top_p", "min_p", "stop")
                sampling = Sampling(
                    **{k: body[k] for k in keys}, top_k=max(0, body["top_k"]), max_new_tokens=body["max_tokens"]
                )
                drawn = self.draw(body["prompt"], body["n"], sampling, body["seed"])
                choices = [
                    {
                        "index": i,
                        "text": text,
                        "token_ids": ids,
                        "prompt_token_ids": body["prompt"],
                        "finish_reason": finish,
                        "logprobs": {"token_logprobs": logps},
                    }
                    for i, (ids, logps, finish, text) in enumerate(drawn)
                ]
                return {"model": body["model"], "choices": choices[::-1]}
            case "/generate":
                s = body["sampling_params"]
                sampling = Sampling(
                    temperature=s["temperature"],
                    top_p=s["top_p"],
                    top_k=max(0, s["top_k"]),
                    min_p=s["min_p"],
                    stop=s["stop"],
                    max_new_tokens=s["max_new_tokens"],
                )
                if self.loaded and body["lora_path"] not in self.loaded:
                    return 400, "no such adapter"
                out = [
                    {
                        "text": text,
                        "meta_info": {
                            "output_token_logprobs": [[p, i, None] for p, i in zip(logps, ids, strict=True)],
                            "prompt_tokens": len(body["input_ids"]),
                            "finish_reason": {"type": finish},
                            "weight_version": self.version,
                        },
                    }
                    for ids, logps, finish, text in self.draw(body["input_ids"], s["n"], sampling, s["sampling_seed"])
                ]
                return out if s["n"] > 1 else out[0]
        return 404, "no such path"


@contextmanager
def serving(fake: Fake) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with fake.lock:
                fake.seen.append((self.path, body))
                fault = next((i for i, (path, _) in enumerate(fake.faults) if path == self.path), None)
                wrong = fake.faults.pop(fault)[1] if fault is not None else None
                reply = fake.answer(self.path, body)
            if wrong is not None:
                reply = wrong(self, reply)
            self.say(reply)

        def do_GET(self) -> None:
            self.say(fake.answer(self.path, None))

        def say(self, reply: Any) -> None:
            if reply is None:
                return
            status, reply = reply if isinstance(reply, tuple) else (200, reply)
            plain = isinstance(reply, str)
            data = reply.encode() if plain else json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if plain else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


CASES = [("vllm", Lora(r=2)), ("sglang", Lora(r=2)), ("sglang", None)]


class Setting:
    def __init__(self, kind: str, adapter: Lora | None, url: str, fake: Fake, folder: Path) -> None:
        self.kind, self.url, self.fake, self.folder = kind, url, fake, folder
        self.policy = tiny_policy(adapter=adapter)
        moved(self.policy, 0)

    def sampler(self, **settings: Any) -> EndpointSampler:
        return EndpointSampler(
            self.policy, RENDERER, Endpoint(url=self.url, engine=self.kind, **settings), self.folder / "served"
        )

    @property
    def path(self) -> str:
        return "/v1/completions" if self.kind == "vllm" else "/generate"


def moved(policy: Policy, seed: int) -> None:
    """Change the weights, as a step would: an adapter's B is 0 at first and its A does nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters().values():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.05)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(endpoint, "WAIT", 0.01)


@pytest.fixture
def setting(request, tmp_path):
    kind, adapter = getattr(request, "param", CASES[0])
    fake = Fake(tiny_policy(adapter=adapter))
    with serving(fake) as url:
        yield Setting(kind, adapter, url, fake, tmp_path)


everywhere = pytest.mark.parametrize("setting", CASES, indirect=True, ids=["vllm", "sglang-lora", "sglang-full"])


@everywhere
@pytest.mark.parametrize("sampling", [PLAIN, Sampling(max_new_tokens=12, stop=("a", "e"))], ids=["plain", "stop"])
def test_rollouts_are_those_of_the_local_engine(setting, sampling):
    examples = asked()[:3]
    rollouts, ledger = setting.sampler()(examples, N, sampling, SEED)
    local = LocalSampler(setting.policy, RENDERER)
    for p, example in enumerate(examples):
        want, _ = local([example], N, sampling, derive(SEED, p) % 2**31)
        for ours, oracle in zip(rollouts[p * N : (p + 1) * N], want, strict=True):
            assert (ours.ids, ours.text, ours.finish, ours.weights) == (
                oracle.ids, oracle.text, oracle.finish, oracle.weights,
            )  # fmt: skip
            assert (ours.example, ours.group, ours.prompt_ids) == (example, p, oracle.prompt_ids)
            torch.testing.assert_close(torch.tensor(ours.logps), torch.tensor(oracle.logps), rtol=1e-4, atol=1e-5)
    assert ledger.generated_tokens == sum(len(r.ids) for r in rollouts)


@everywhere
def test_every_update_reaches_the_server(setting):
    sampler = setting.sampler()
    for step in range(3):
        moved(setting.policy, step + 1)
        rollouts, _ = sampler(asked()[:1], 2, PLAIN, step)
        assert {r.weights for r in rollouts} == {setting.policy.digest()}
        for name, p in setting.fake.policy.parameters().items():
            assert torch.equal(p, setting.policy.parameters()[name])
    assert len(setting.fake.loaded) <= 1  # what it need not have any more is dropped, and so is its folder
    assert [f.name for f in (setting.folder / "served").iterdir()] == [setting.policy.digest()]


@everywhere
def test_unchanged_weights_are_sent_once(setting):
    sampler = setting.sampler()
    for seed in range(3):
        sampler(asked()[:1], 2, PLAIN, seed)
    assert sum("load" in path or "update" in path for path, _ in setting.fake.seen) == 1


@everywhere
def test_grpo_trains_on_them_as_on_its_own(setting):
    """The behaviour log-probabilities are those that the trainer finds: the importance weight is 1."""
    rows: list[dict[str, Any]] = []
    stage = stage_of("grpo", steps=3, kl_weight=0.0)
    method = grpo(setting.policy, stage, sampler=setting.sampler())
    train(setting.policy, method, stage, setting.folder / "run", SEED, rows.append)
    trained = [row for row in rows if "mismatch_max" in row]  # the others had no group with signal
    assert len(rows) == 3
    assert trained
    for row in trained:
        assert row["mismatch_min"] == pytest.approx(1, abs=1e-3)
        assert row["mismatch_max"] == pytest.approx(1, abs=1e-3)


def test_grpo_refuses_rollouts_of_other_weights():
    policy = tiny_policy()
    behind = LocalSampler(tiny_policy(), RENDERER)
    moved(policy, 1)
    with pytest.raises(Failure, match="did not get the policy's weights"):
        grpo(policy, stage_of("grpo"), sampler=behind).batch(0)


def server_error(handler, reply):
    return 503, "busy"


def cut_short(handler, reply):
    """Half the JSON under the whole's length."""
    data = json.dumps(reply).encode()
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[: len(data) // 2])
    handler.close_connection = True


def not_json(handler, reply):
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "9")
    handler.end_headers()
    handler.wfile.write(b'{"choices')


def hang(handler, reply):
    time.sleep(0.4)
    handler.close_connection = True


PASSING = [server_error, cut_short, not_json, hang]


@everywhere
@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_tried_again(setting, fault):
    setting.fake.faults = [(setting.path, fault)] * 2
    rollouts, _ = setting.sampler(timeout_s=0.2 if fault is hang else 30)(asked()[:1], 2, PLAIN, SEED)
    assert [path for path, _ in setting.fake.seen].count(setting.path) == 3
    want, _ = LocalSampler(setting.policy, RENDERER)(asked()[:1], 2, PLAIN, derive(SEED, 0) % 2**31)
    assert [r.ids for r in rollouts] == [r.ids for r in want]


@pytest.mark.parametrize("fault", PASSING)
def test_what_does_not_pass_ends_in_a_failure(setting, fault):
    setting.fake.faults = [(setting.path, fault)] * 2
    with pytest.raises(Failure, match="did not answer in 2 attempts"):
        setting.sampler(retries=1, timeout_s=0.2 if fault is hang else 30)(asked()[:1], 2, PLAIN, SEED)


def test_a_load_that_only_seemed_to_fail_is_not_one(setting):
    setting.fake.faults = [("/v1/load_lora_adapter", server_error)]
    rollouts, _ = setting.sampler()(asked()[:1], 2, PLAIN, SEED)
    assert rollouts[0].weights == setting.policy.digest()


def test_nobody_there(tmp_path):
    sampler = EndpointSampler(
        tiny_policy(adapter=Lora(r=2)), RENDERER, Endpoint(url="http://127.0.0.1:9", engine="vllm", retries=1), tmp_path
    )
    with pytest.raises(Failure, match="did not answer"):
        sampler(asked()[:1], 2, PLAIN, 0)


def in_choice(**changes: Any) -> Fault:
    def change(handler, reply):
        reply["choices"][0] |= changes
        return reply

    return change


def in_meta(**changes: Any) -> Fault:
    def change(handler, reply):
        reply[0]["meta_info"] |= changes
        return reply

    return change


WRONG: list[tuple[int, Fault, str]] = [
    (0, lambda handler, reply: reply | {"model": "posttrain-" + "0" * 64}, "sampled with weights"),
    (0, lambda handler, reply: reply | {"model": "base"}, "sampled with weights"),
    (0, in_choice(logprobs=None), "not of the form expected"),
    (0, in_choice(logprobs={"token_logprobs": [None] * 6}, token_ids=[5] * 6), "without a log-probability"),
    (0, in_choice(logprobs={"token_logprobs": [-1.0]}, token_ids=[5, 6]), "without a log-probability"),
    (0, in_choice(logprobs={"token_logprobs": [-math.inf]}, token_ids=[5]), "without a log-probability"),
    (0, in_choice(token_ids=None), "not of the form expected"),
    (0, in_choice(token_ids=[5] * 7, logprobs={"token_logprobs": [-1.0] * 7}), "7 tokens in a completion of at most 6"),
    (0, in_choice(token_ids=[2, 5], logprobs={"token_logprobs": [-1.0] * 2}), "goes on after its end-of-turn"),
    (
        0,
        in_choice(token_ids=[5], logprobs={"token_logprobs": [-1.0]}, finish_reason="stop"),
        "end-of-turn token is missing",
    ),
    (0, in_choice(finish_reason="abort"), "ended with 'abort'"),
    (0, in_choice(prompt_token_ids=[1, 2]), "changed the prompt"),
    (0, lambda handler, reply: reply | {"choices": reply["choices"][:1]}, "1 completions of"),
    (0, lambda handler, reply: [], "not of the form expected"),
    (1, in_meta(output_token_logprobs=[]), "not of the form expected"),
    (1, in_meta(prompt_tokens=3), "changed the prompt"),
    (1, in_meta(finish_reason={"type": "abort"}), "ended with 'abort'"),
    (2, in_meta(weight_version="default"), "sampled with weights 'default'"),
]


@pytest.mark.parametrize(("case", "fault", "match"), WRONG)
def test_a_wrong_answer_is_refused(tmp_path, case, fault, match):
    kind, adapter = CASES[case]
    fake = Fake(tiny_policy(adapter=adapter))
    with serving(fake) as url:
        setting = Setting(kind, adapter, url, fake, tmp_path)
        fake.faults = [(setting.path, fault)]
        with pytest.raises(Failure, match=match):
            setting.sampler()(asked()[:1], 2, PLAIN, SEED)


def test_a_folder_the_server_did_not_load(setting):
    real = setting.fake.answer

    def answer(path, body):
        reply = real(path, body)
        if path == "/v1/models":
            reply["data"] = [m | {"root": "/elsewhere"} for m in reply["data"]]
        return reply

    setting.fake.answer = answer
    with pytest.raises(Failure, match="serves /elsewhere"):
        setting.sampler()(asked()[:1], 2, PLAIN, SEED)


def test_another_base_model_is_noticed(setting):
    """The digest speaks of the adapter; what it stands on shows in the numbers."""
    setting.fake.policy = tiny_policy(adapter=Lora(r=2), seed=1)
    with pytest.raises(Failure, match=r"from the trainer's .* does it serve tiny/llama"):
        setting.sampler()(asked()[:1], 2, Sampling(max_new_tokens=20), SEED)


CUTS = {"top_k": {"top_k": 4}, "none": {}}
REPORTS = [
    # reports, temperature, cuts, right
    ("raw", 1.0, "none", True),
    ("raw", 1.0, "top_k", True),
    ("raw", 0.7, "none", False),
    ("scaled", 0.7, "none", True),
    ("scaled", 0.7, "top_k", True),
    ("cut", 1.0, "none", True),
    ("cut", 0.7, "none", True),
    ("cut", 1.0, "top_k", False),
    ("cut", 0.7, "top_k", False),
]


@pytest.mark.parametrize(("reports", "temperature", "cuts", "right"), REPORTS)
def test_log_probabilities_of_another_kind_are_refused(setting, reports, temperature, cuts, right):
    """A server that reports before the temperature, between it and the cuts, or after both: found out by asking, and
    taken only where its numbers are those of a rollout."""
    setting.fake.reports = reports
    sampling = Sampling(temperature=temperature, max_new_tokens=6, **CUTS[cuts])
    if not right:
        with pytest.raises(UserError, match="reports log-probabilities"):
            setting.sampler()(asked()[:1], 2, sampling, SEED)
        return
    rollouts, _ = setting.sampler()(asked()[:1], 2, sampling, SEED)
    want, _ = LocalSampler(setting.policy, RENDERER)(asked()[:1], 2, sampling, derive(SEED, 0) % 2**31)
    for ours, oracle in zip(rollouts, want, strict=True):
        assert ours.ids == oracle.ids
        torch.testing.assert_close(torch.tensor(ours.logps), torch.tensor(oracle.logps), rtol=1e-4, atol=1e-5)


def test_vllm_takes_adapters_only(tmp_path):
    with pytest.raises(UserError, match="train an adapter"):
        EndpointSampler(tiny_policy(), RENDERER, Endpoint(url="http://x", engine="vllm"), tmp_path)


def test_a_refusal_says_what_the_server_said_and_where_the_key_goes(setting, monkeypatch):
    setting.fake.faults = [(setting.path, lambda handler, reply: (401, "no key"))]
    with pytest.raises(UserError, match="no key; set POSTTRAIN_ENDPOINT_KEY"):
        setting.sampler()(asked()[:1], 2, PLAIN, SEED)

    keys: list[str | None] = []

    def remember(handler, reply):
        keys.append(handler.headers["Authorization"])
        return reply

    setting.fake.faults = [(setting.path, remember)]
    monkeypatch.setenv(endpoint.KEY, "secret")
    setting.sampler()(asked()[:1], 2, PLAIN, SEED)
    assert keys == ["Bearer secret"]


def test_a_prompt_without_room_is_refused_before_anything_is_sent(setting):
    long = Example("long", ({"role": "user", "content": "word " * 400},))
    with pytest.raises(UserError, match="no room for an answer"):
        setting.sampler()([long], 2, PLAIN, SEED)
    assert setting.fake.seen == []
