"""A GGUF file as the directory of safetensors it was made from, as far as its quantisation kept it."""

from __future__ import annotations

import io
import sys
import tempfile
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from posttrain.models.quiet import quiet
from posttrain.records import UserError

FORMAT = 1
"""Raised when the same file would convert to something else; part of the cache's key."""

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEXTS = (
    "12345 + 678 = 13023",
    "  two spaces  7\n\n8\tand a tab",
    "naïve café, 漢字, Привет, 🙂👩‍👩‍👧",
    "def f(x):\n    return x  # it's fine\n",
)


def convert(file: Path, folder: Path) -> None:
    """Write the model in `file` to `folder`, in the smallest of float32, bfloat16 and float16 that is exact.

    Transformers reads the weights; it does not read how the file's tokenizer splits text before merging, which
    decides about numbers and white space, so that is set here from `tokenizer.ggml.pre`.

    Raises:
        UserError: the file is broken, of an architecture Transformers cannot convert, or splits text by a rule
            not known here: a tokenizer that is slightly wrong would only show as a model that is slightly worse.
    """
    print(f"converting {file.name} to safetensors once, cached in {folder.parent}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as alone, quiet(), redirect_stderr(io.StringIO()):  # a bare tqdm bar
        # Alone in a folder: a config or tokenizer that lies beside the file must not mix with the file's own.
        (Path(alone) / file.name).symlink_to(file.resolve())
        try:
            fields = GGUFReader(file).fields
            kind, split = (_text(fields, f"tokenizer.ggml.{key}") for key in ("model", "pre"))
            model, report = AutoModelForCausalLM.from_pretrained(
                alone, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=file.name)
        except (OSError, ValueError, KeyError, IndexError, RuntimeError, NotImplementedError) as error:
            raise UserError(
                f"{file}: cannot be read as a GGUF model ({_first_line(error)}); fetch it again, or use the "
                "safetensors release of the model"
            ) from error
        if report["missing_keys"]:  # Transformers would go on with random numbers in their place
            raise UserError(f"{file}: lacks {len(report['missing_keys'])} of the model's tensors; fetch it again")
        if kind == "gpt2":
            _set_split(tokenizer, split, file)
        tokenizer.model_max_length = model.config.max_position_embeddings
        _check_tokenizer(tokenizer, file)
        _drop_quantisation(model)
        model.config.name_or_path = ""
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.to(_exact_dtype(model)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _check_weights(model, folder)


def _set_split(tokenizer: PreTrainedTokenizerBase, split: str | None, file: Path) -> None:
    """Rules by the names that llama.cpp gives them. Byte-level BPE only."""
    backend = tokenizer.backend_tokenizer
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    only_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if split in ("gpt-2", "default"):
        backend.pre_tokenizer = words
    elif split == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    elif split == "qwen2":
        regex = pre_tokenizers.Split(Regex(_WORDS % ""), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([regex, only_bytes])
        backend.normalizer = normalizers.NFC()
    elif split == "llama-bpe":
        regex = pre_tokenizers.Split(Regex(_WORDS % "{1,3}"), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([regex, only_bytes])
        backend.model.ignore_merges = True
    else:
        raise UserError(
            f"{file}: its tokenizer splits text by the rule {split!r}, which is not known here (known: default, "
            "gpt-2, llama-bpe, qwen2, smollm); use the safetensors release of the model"
        )


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    for text in _TEXTS:
        back = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
        if back.lstrip() != text.lstrip():  # SentencePiece may add or drop one leading space
            raise UserError(f"{file}: its tokenizer turns {text!r} into {back!r}; use the safetensors release")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{file}: names no end-of-turn token (tokenizer.ggml.eos_token_id)")
    for token in tokenizer.all_special_tokens:
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
        if ids != [tokenizer.convert_tokens_to_ids(token)]:
            raise UserError(f"{file}: its special token {token!r} is read as the {len(ids)} tokens {ids}")


def _drop_quantisation(model: PreTrainedModel) -> None:
    """The weights are plain tensors by now; `save_pretrained` refuses as long as these marks say otherwise."""
    for holder, mark in (
        (model, "hf_quantizer"),
        (model, "is_quantized"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
        (model.config, "_is_quantized"),
    ):
        if mark in vars(holder):
            delattr(holder, mark)


def _exact_dtype(model: PreTrainedModel) -> torch.dtype:
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(p.to(dtype).float(), p) for p in model.parameters()):
            return dtype
    return torch.float32


def _check_weights(model: PreTrainedModel, folder: Path) -> None:
    written: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        written |= load_file(file)
    for name, parameter in model.named_parameters():
        if not torch.equal(written[name], parameter):
            raise UserError(f"{folder}: {name} was not written as it was read; is the disk healthy?")


def _text(fields: dict[str, Any], key: str) -> str | None:
    return str(fields[key].contents()) if key in fields else None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
