"""Rollouts from an inference server, vLLM or SGLang, that is given the policy's weights before it samples.

Token ids are the truth in both directions: prompts go out as ids, and completions come back as the ids that were
drawn and their log-probabilities; nothing is tokenised again. Weights travel through a folder that both sides see,
named by their digest: what comes from any others is refused.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from posttrain.forest import Row, pack, token_logprobs
from posttrain.models.policy import Policy
from posttrain.recipe.blocks import Sampling
from posttrain.recipe.rl import Endpoint
from posttrain.records import Example, Failure, Ledger, Rollout, UserError, derive
from posttrain.sampling.protocol import Renderer, completion_text, room

KEY = "POSTTRAIN_ENDPOINT_KEY"
"""Environment variable with the server's API key, where it asks for one: a key does not belong in a recipe."""
REQUESTS = 64
"""Prompts on their way at one time; the server batches them."""
WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds before the second attempt, doubled for each further one up to the longest."""
TOLERANCE = 0.5
"""Nats a token, in the mean, by which server and trainer may differ. Precision and kernels make hundredths; another
base model makes more than this."""


class Drawn(NamedTuple):
    """A completion as the server gives it."""

    ids: tuple[int, ...]
    logps: tuple[float, ...]
    """NaN where the server gave none."""
    finish: str
    weights: str
    """Digest of the weights that made it, by what the server says."""


class Engine(Protocol):
    """What differs from one kind of server to another."""

    def load(self, digest: str, folder: Path) -> None:
        """Give it the weights in `folder`; when this returns it says that it has them."""

    def drop(self, digest: str) -> None:
        """It may forget these weights."""

    def draw(
        self, digest: str, prompt: Sequence[int], n: int, sampling: Sampling, seed: int, eos: Sequence[int]
    ) -> list[Drawn]:
        """`n` completions, with the tokens in `eos` as ends besides what `sampling` says."""


class EndpointSampler:
    """A `Sampler`. The same seed gives the same rollouts only where the server computes a request in the same way
    whatever else it is busy with; servers do so by special settings, if at all.

    Raises, besides what every sampler does:
        UserError: the server refuses a request, or reports log-probabilities that are not those of this sampling.
        Failure: it cannot be reached, breaks its protocol, or has other weights than it was given.
    """

    def __init__(self, policy: Policy, renderer: Renderer, endpoint: Endpoint, folder: Path) -> None:
        self.policy, self.renderer = policy, renderer
        self.folder = folder.resolve()
        """Where weights are put for the server to load."""
        server = Server(endpoint)
        adapter = policy.adapter is not None
        self.engine: Engine = Vllm(server, adapter) if endpoint.engine == "vllm" else Sglang(server, adapter)
        self.eos = sorted(policy.eos_ids)
        self.served: str | None = None
        self.reports: str | None = None
        """What the server's log-probabilities are: see `_reported`."""

    def __call__(
        self, prompts: Sequence[Example], n: int, sampling: Sampling, seed: int
    ) -> tuple[list[Rollout], Ledger]:
        began = time.perf_counter()
        ids = [self.renderer.prompt_ids(example) for example in prompts]
        rooms = [
            room(example, len(p), sampling.max_new_tokens, self.policy.context)
            for example, p in zip(prompts, ids, strict=True)
        ]
        first = self.served is None
        digest = self._deliver()
        self._check_reports(digest, ids[0], sampling)

        def ask(p: int) -> list[Drawn]:
            limited = sampling.model_copy(update={"max_new_tokens": rooms[p]})
            drawn = self.engine.draw(digest, ids[p], n, limited, derive(seed, p) % 2**31, self.eos)
            if len(drawn) != n:
                raise Failure(f"endpoint: {len(drawn)} completions of {prompts[p].id} in place of {n}")
            for one in drawn:
                _check(one, digest, limited, self.eos)
            return drawn

        with ThreadPoolExecutor(REQUESTS) as threads:
            groups = list(threads.map(ask, range(len(prompts))))
        if first:
            self._check_model(ids[0], groups[0][0], sampling)
        rollouts = [
            Rollout(
                prompts[p],
                p,
                ids[p],
                one.ids,
                one.logps,
                completion_text(self.renderer.decode(one.ids), sampling.stop),
                "stop" if one.finish == "stop" else "length",
                one.weights,
            )
            for p, group in enumerate(groups)
            for one in group
        ]
        computed = sum(map(len, ids))
        return rollouts, Ledger(
            prompt_tokens=computed,
            cached_tokens=computed * (n - 1),
            generated_tokens=sum(len(r.ids) for r in rollouts),
            seconds=time.perf_counter() - began,
        )

    def _deliver(self) -> str:
        """See to it that the server has the policy's weights of this moment; returns their digest."""
        digest = self.policy.digest()
        if digest != self.served:
            folder = self.folder / digest
            self.policy.save(folder)
            self.engine.load(digest, folder)
            if self.served is not None:
                with suppress(UserError):  # a server that was restarted has forgotten it already
                    self.engine.drop(self.served)
            self.served = digest
            for other in self.folder.iterdir():
                if other != folder:
                    shutil.rmtree(other)
        return digest

    def _check_reports(self, digest: str, prompt: Sequence[int], sampling: Sampling) -> None:
        """A rollout's log-probabilities are under the temperature and before the cuts. Are the server's?"""
        cuts = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
        if sampling.temperature == 1 and not cuts:
            return  # then every way of reporting them gives the same
        if self.reports is None:
            self.reports = self._reported(digest, prompt)
        usable = {
            "raw": sampling.temperature in (0, 1),
            "scaled": True,
            "cut": sampling.temperature > 0 and not cuts,
        }
        if not usable[self.reports]:
            told = {"raw": "before temperature and cuts", "cut": "after temperature and cuts"}[self.reports]
            raise UserError(
                f"endpoint: the server reports log-probabilities {told}, and training needs them after the temperature "
                "and before the cuts. Set sampling.temperature: 1 and no top_p, top_k and min_p, or start the server "
                "otherwise (vLLM: --logprobs-mode processed_logprobs where only the temperature differs)"
            )

    def _reported(self, digest: str, prompt: Sequence[int]) -> str:
        """`raw`: log-probabilities before temperature and cuts. `scaled`: between them. `cut`: after both.

        No server says; so it is asked for one likeliest token (top_k 1, after which its probability is 1) at two
        temperatures, and the trainer knows what each way of reporting would give.
        """
        for part in range(4, 0, -1):
            prefix = tuple(prompt[: max(1, len(prompt) * part // 4)])
            far = {"raw": 0.0, "scaled": 0.0, "cut": 0.0}
            for temperature in (1.0, 2.0):
                probe = Sampling(temperature=temperature, top_k=1, max_new_tokens=1)
                (one,) = self.engine.draw(digest, prefix, 1, probe, 0, [])
                _check(one, digest, probe, [])
                told = one.logps[0]
                far["raw"] += abs(told - self._logps(prefix, one.ids, 1.0)[0])
                far["scaled"] += abs(told - self._logps(prefix, one.ids, temperature)[0])
                far["cut"] += abs(told)
            nearest, second, _ = sorted(far, key=lambda way: far[way])
            if far[second] - far[nearest] > 0.1 and far[nearest] < TOLERANCE:
                return nearest
        raise Failure(
            "endpoint: cannot tell whether the server's log-probabilities are before or after temperature and cuts; "
            "set sampling.temperature: 1 and no top_p, top_k and min_p, where it does not matter"
        )

    def _check_model(self, prompt: Sequence[int], one: Drawn, sampling: Sampling) -> None:
        """Digests name the weights that were sent; this sees that they stand on the same base."""
        ours = self._logps(prompt, one.ids, sampling.temperature or 1.0)
        apart = sum(abs(a - b) for a, b in zip(ours, one.logps, strict=True)) / len(ours)
        if not apart <= TOLERANCE:
            raise Failure(
                f"endpoint: its log-probabilities are {apart:.2g} nats a token from the trainer's (allowed: "
                f"{TOLERANCE}); does it serve {self.policy.source}?"
            )

    @torch.no_grad()
    def _logps(self, prompt: Sequence[int], ids: Sequence[int], temperature: float) -> list[float]:
        forest = pack([Row(tuple(prompt), tuple(ids), (True,) * len(ids))])
        found: list[float] = token_logprobs(self.policy.model, forest, temperature)[-len(ids) :].tolist()
        return found


def _check(one: Drawn, digest: str, sampling: Sampling, eos: Sequence[int]) -> None:
    """Refuse what could not be trained on rightly."""
    if one.weights != digest:
        raise Failure(f"endpoint: sampled with weights {one.weights!r}, and the policy's are {digest!r}")
    if one.finish not in ("stop", "length"):
        raise Failure(f"endpoint: a completion ended with {one.finish!r}; is the server shutting down?")
    if not 0 < len(one.ids) <= sampling.max_new_tokens:
        raise Failure(f"endpoint: {len(one.ids)} tokens in a completion of at most {sampling.max_new_tokens}")
    if len(one.logps) != len(one.ids) or not all(-math.inf < p < 1e-3 for p in one.logps):  # 0 may round up
        raise Failure("endpoint: a completion came without a log-probability for each of its tokens")
    if not set(one.ids[:-1]).isdisjoint(eos):
        raise Failure("endpoint: a completion goes on after its end-of-turn token; does the server ignore it?")
    if one.finish == "stop" and not sampling.stop and eos and one.ids[-1] not in eos:
        raise Failure("endpoint: a completion was stopped and its end-of-turn token is missing")


class Server:
    """JSON over HTTP, with patience for what may pass: a busy or restarting server, a cut connection."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.url = endpoint.url.rstrip("/")

    def get(self, path: str) -> Any:
        return self._until_answered(path, None)

    def post(self, path: str, body: Any) -> Any:
        return self._until_answered(path, body)

    def _until_answered(self, path: str, body: Any) -> Any:
        for attempt in range(self.endpoint.retries + 1):
            if attempt:
                time.sleep(min(WAIT * 2 ** (attempt - 1), LONGEST_WAIT))
            try:
                return self._ask(path, body)
            except urllib.error.HTTPError as error:
                said = f"{error.code}: {error.read(1000).decode(errors='replace').strip()}"
                if error.code < 500 and error.code not in (408, 429):
                    key = f"; set {KEY}" if error.code in (401, 403) else ""
                    raise UserError(f"endpoint: {self.url}{path} refuses: {said}{key}") from None
                why = said
            except (OSError, http.client.HTTPException, ValueError) as error:
                why = f"{type(error).__name__}: {error}"
        raise Failure(
            f"endpoint: {self.url}{path} did not answer in {self.endpoint.retries + 1} attempts (the last: {why}). The "
            "same command continues the run when the server is well again"
        )

    def _ask(self, path: str, body: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        if KEY in os.environ:
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        with urllib.request.urlopen(request, timeout=self.endpoint.timeout_s) as reply:
            text = reply.read().decode()
            return json.loads(text) if "json" in reply.headers.get("Content-Type", "") else text


class Vllm:
    """vLLM's OpenAI-compatible server, with `--enable-lora` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True.

    Each update is an adapter under a name of its own. Reloading one name in place would be shorter, and has served
    stale prefix-cache blocks (vllm#42125) and read the disk again for every request (vllm#41482).
    """

    def __init__(self, server: Server, adapter: bool) -> None:
        if not adapter:
            raise UserError(
                "endpoint: vLLM cannot say which weights a whole model has; train an adapter (model.adapter), or use "
                "engine: sglang"
            )
        self.server = server

    def load(self, digest: str, folder: Path) -> None:
        name = _name(digest)
        if self._root(name) != str(folder):
            try:
                self.server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
            except UserError:
                if self._root(name) != str(folder):  # else an attempt that seemed to fail has loaded it
                    raise
            if (root := self._root(name)) != str(folder):
                raise Failure(f"endpoint: was given the adapter {folder} and serves {root} under its name")

    def _root(self, name: str) -> str | None:
        """The folder that a served adapter was loaded from; None where there is none of that name."""
        return next((m.get("root") for m in self.server.get("/v1/models")["data"] if m["id"] == name), None)

    def drop(self, digest: str) -> None:
        self.server.post("/v1/unload_lora_adapter", {"lora_name": _name(digest)})

    def draw(
        self, digest: str, prompt: Sequence[int], n: int, sampling: Sampling, seed: int, eos: Sequence[int]
    ) -> list[Drawn]:
        body = {
            "model": _name(digest),
            "prompt": list(prompt),
            "n": n,
            "max_tokens": sampling.max_new_tokens,
            **_distribution(sampling),
            # Said although they are OpenAI's defaults: the model's generation config may have others.
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop": list(sampling.stop),
            "stop_token_ids": list(eos),
            "seed": seed,
            "logprobs": 0,
            "return_token_ids": True,
        }
        reply = self.server.post("/v1/completions", body)
        with _protocol():
            for choice in reply["choices"]:
                if choice["prompt_token_ids"] != list(prompt):
                    raise Failure("endpoint: the server changed the prompt; is its context shorter than the model's?")
            weights = str(reply["model"]).removeprefix(_name(""))
            return [
                Drawn(tuple(c["token_ids"]), _numbers(c["logprobs"]["token_logprobs"]), c["finish_reason"], weights)
                for c in sorted(reply["choices"], key=lambda c: c["index"])
            ]


class Sglang:
    """SGLang's own interface, `/generate`. For an adapter it must be started with `--enable-lora`.

    A whole model is replaced by `/update_weights_from_disk`, and every completion says which version made it. An
    adapter has a name of its own for each update, by which it is asked for.
    """

    def __init__(self, server: Server, adapter: bool) -> None:
        self.server, self.adapter = server, adapter

    def load(self, digest: str, folder: Path) -> None:
        if self.adapter:
            path, body = "/load_lora_adapter", {"lora_name": _name(digest), "lora_path": str(folder)}
        else:
            path, body = "/update_weights_from_disk", {"model_path": str(folder), "weight_version": digest}
        reply = self.server.post(path, body)
        with _protocol():
            if not reply["success"]:
                raise Failure(f"endpoint: did not load {folder}: {reply.get('error_message') or reply.get('message')}")

    def drop(self, digest: str) -> None:
        if self.adapter:
            self.server.post("/unload_lora_adapter", {"lora_name": _name(digest)})

    def draw(
        self, digest: str, prompt: Sequence[int], n: int, sampling: Sampling, seed: int, eos: Sequence[int]
    ) -> list[Drawn]:
        body = {
            "input_ids": list(prompt),
            "return_logprob": True,
            "sampling_params": {
                "n": n,
                "max_new_tokens": sampling.max_new_tokens,
                **_distribution(sampling),
                "stop": list(sampling.stop),
                "stop_token_ids": list(eos),
                "sampling_seed": seed,
            },
        }
        if self.adapter:
            body["lora_path"] = _name(digest)
        reply = self.server.post("/generate", body)
        with _protocol():
            drawn = []
            for meta in (one["meta_info"] for one in (reply if isinstance(reply, list) else [reply])):
                if meta["prompt_tokens"] != len(prompt):
                    raise Failure("endpoint: the server changed the prompt; is its context shorter than the model's?")
                logps, ids = zip(*((p, i) for p, i, *_ in meta["output_token_logprobs"]), strict=True)
                weights = digest if self.adapter else str(meta["weight_version"])
                drawn.append(Drawn(ids, _numbers(logps), meta["finish_reason"]["type"], weights))
            return drawn


@contextmanager
def _protocol() -> Iterator[None]:
    """What an answer lacks, said as the server's failure it is."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Failure(
            f"endpoint: an answer is not of the form expected ({type(error).__name__}: {error}); is `engine` right? Is "
            "the server recent enough to return token ids and log-probabilities?"
        ) from error


def _numbers(values: Iterable[float | None]) -> tuple[float, ...]:
    return tuple(math.nan if value is None else float(value) for value in values)


def _name(digest: str) -> str:
    """What the weights of that digest are called at the server."""
    return f"posttrain-{digest}"


def _distribution(sampling: Sampling) -> dict[str, float]:
    """The keys that both kinds of server call the same."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
    }
