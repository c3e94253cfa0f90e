"""Those that `sampling.py` compares with, in the environment of `peers.py`: one answer to all prompts a turn.

    side_generate.py FOLDER generate|onednn|continuous|llama

`onednn` is `generate` under the float32 products that posttrain takes. `llama` is llama.cpp on the 4-bit weights the
default model comes in: another precision, here as the limit of what this processor decodes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from workload import Turn

Prompts = list[list[int]]
"""Each prompt as often as it has completions, those of one prompt together."""


def transformers(job: dict[str, Any], how: str) -> Callable[[Prompts], Prompts]:
    if how == "onednn":
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    common = {"do_sample": False, "max_new_tokens": job["new_tokens"], "pad_token_id": job["eos"][0]}
    config = GenerationConfig(eos_token_id=job["eos"], **common)

    def padded(prompts: Prompts) -> Prompts:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in prompts])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
        with torch.no_grad():
            return model.generate(ids, attention_mask=mask, generation_config=config)[:, longest:].tolist()

    def continuous(prompts: Prompts) -> Prompts:
        # Blocks of cache for all of it; Transformers would size them by the memory of a GPU.
        blocks = sum(len(row) + job["new_tokens"] for row in prompts) // 32 + 4 * len(prompts)
        batching = ContinuousBatchingConfig(page_size=32, num_blocks=blocks, max_batch_tokens=1024)
        out = model.generate_batch(prompts, generation_config=config, continuous_batching_config=batching)
        done = list(out.values())  # in the order of the prompts
        return [list(one.generated_tokens) for one in done]

    return continuous if how == "continuous" else padded


def llama(job: dict[str, Any], how: str) -> Callable[[Prompts], Prompts]:
    """llama.cpp's own batched decoding, greedy: each distinct prompt once, its cache shared by its completions."""
    import llama_cpp as cpp
    import numpy as np

    threads = torch.get_num_threads()
    cpp.llama_backend_init()
    model = cpp.llama_model_load_from_file(job["gguf"].encode(), cpp.llama_model_default_params())
    vocabulary = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(model))

    def sample(prompts: Prompts) -> Prompts:
        params = cpp.llama_context_default_params()
        params.n_ctx = sum(len(row) + job["new_tokens"] for row in prompts) + 256
        params.n_batch = params.n_ubatch = 2048
        params.n_seq_max, params.kv_unified = len(prompts), True
        params.n_threads = params.n_threads_batch = threads
        context = cpp.llama_init_from_model(model, params)
        memory = cpp.llama_get_memory(context)
        batch = cpp.llama_batch_init(2048, 0, 1)

        def decode(tokens: list[tuple[int, int, int, bool]]) -> list[int]:
            """(token, position, sequence, whether its successor is wanted) each; the successors."""
            batch.n_tokens = len(tokens)
            for i, (token, position, sequence, wanted) in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            if code := cpp.llama_decode(context, batch):
                sys.exit(f"llama_decode gave {code}")
            rows = [i for i, (*_, wanted) in enumerate(tokens) if wanted]
            return [
                int(np.ctypeslib.as_array(cpp.llama_get_logits_ith(context, i), (vocabulary,)).argmax()) for i in rows
            ]

        written: Prompts = [[] for _ in prompts]
        for s, prompt in enumerate(prompts):
            if s and prompt == prompts[s - 1]:
                cpp.llama_memory_seq_cp(memory, s - 1, s, -1, -1)
                written[s] = list(written[s - 1])
            else:
                last = len(prompt) - 1
                written[s] = decode([(token, i, s, i == last) for i, token in enumerate(prompt)])
        live = list(range(len(prompts)))
        while live := [s for s in live if len(written[s]) < job["new_tokens"] and written[s][-1] not in job["eos"]]:
            ends = [(written[s][-1], len(prompts[s]) + len(written[s]) - 1, s, True) for s in live]
            for s, token in zip(live, decode(ends), strict=True):
                written[s].append(token)
        cpp.llama_batch_free(batch)
        cpp.llama_free(context)
        return written

    return sample


def main() -> None:
    folder, how = Path(sys.argv[1]), sys.argv[2]
    job = json.loads((folder / "job.json").read_text())
    turn = Turn()
    sample = (llama if how == "llama" else transformers)(job, how)
    warm = [row[:16] for row in job["prompts"][:2]]
    sample(warm)
    turn(written=0)
    while True:
        written = [_until_end(ids, job["eos"]) for ids in sample(job["prompts"])]
        turn(written=sum(map(len, written)), ids=written)


def _until_end(ids: list[int], eos: list[int]) -> list[int]:
    return ids[: next((i + 1 for i, token in enumerate(ids) if token in eos), len(ids))]


if __name__ == "__main__":
    main()
