"""A model that is trained: its weights by name, their digest; load, swap, save, merge."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from posttrain.machine import tune
from posttrain.models import place
from posttrain.models.disk import staged
from posttrain.models.fused import fuse
from posttrain.models.quiet import quiet
from posttrain.models.source import is_hub_id, json_file, resolve
from posttrain.models.template import end_of_turn, with_template
from posttrain.recipe.blocks import Lora
from posttrain.records import Artifact, UserError

RECORD = "posttrain.json"
"""File beside saved weights that says where the base came from and what the digests are."""

PROBES = (
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "def add(a, b):\n    return a + b\n\nprint(add(12, 30))  # 42",
    "What is 17 + 25? Think it through, then give the answer on its own line.",
)
"""Texts on which a merged model is compared with the unmerged one."""


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    sha = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        sha.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


@dataclass(frozen=True, eq=False)
class Policy:
    """A causal language model and its tokenizer, or the reward model that models/reward.py makes of one.

    The model stays in eval mode, in training too: a policy whose dropout fires has no log-probabilities that
    a sampler, a reference or a second pass could agree with. Only `adapter_dropout` switches anything on.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    """Where the base came from, in a form that `load` takes again."""
    base_digest: str
    """Digest of the base's weights; where all weights are trained, `digest()` before the first step."""
    revision: str | None = None
    """Of the base, where `source` is a hub id."""

    @property
    def adapter(self) -> LoraConfig | None:
        return self.model.peft_config["default"] if isinstance(self.model, PeftModel) else None

    def parameters(self) -> dict[str, nn.Parameter]:
        """Trainable weights by name. Tied weights appear once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @cached_property
    def parameters_total(self) -> int:
        """Number of weights, trainable or not, tied ones once, the adapter's included."""
        return sum(p.numel() for p in self.model.parameters())

    def run(self, compute: Callable[..., Tensor], *args: Any, more: bool = False) -> Tensor:
        """`compute(model, *args)`, one forward pass. Where workers hold parts of the model, all of them make it.

        `more` says that its gradient is a part only, and that another pass follows before it is used.
        """
        return compute(self.model, *args)

    def weights(self) -> Mapping[str, Tensor]:
        """Trainable weights by name, whole. Where workers hold parts of the model, all of them must ask."""
        return self.parameters()

    def digest(self, weights: Mapping[str, Tensor] | None = None) -> str:
        """Name of the function that the model computes now: changes if and only if a weight changes.

        `weights` are what `self.weights()` gives, for who has them already.
        """
        trained = weights_digest(self.weights() if weights is None else weights)
        if self.adapter is None:
            return trained
        scale = f"{self.adapter.lora_alpha}/{self.adapter.r}"
        return hashlib.sha256(f"{self.base_digest}+{trained}*{scale}".encode()).hexdigest()

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the trainable weights."""
        return {name: p.detach().clone() for name, p in self.parameters().items()}

    @contextmanager
    def swapped(self, snapshot: Mapping[str, Tensor]) -> Iterator[None]:
        """Compute with the weights of `snapshot`, without gradients: a reference model that shares the base.

        Storage is exchanged, nothing is copied, and the weights come back exactly, after an exception too.
        A graph built before may be used for `backward` afterwards, not inside.
        """
        live = self.parameters()
        if live.keys() != snapshot.keys():
            raise ValueError("the snapshot is of another model: its weights have other names")
        kept = {name: p.data for name, p in live.items()}
        try:
            for name, p in live.items():
                p.data = snapshot[name]
            with torch.no_grad():
                yield
        finally:
            for name, p in live.items():
                p.data = kept[name]

    @contextmanager
    def adapter_dropout(self) -> Iterator[None]:
        """Let the adapter's dropout fire; the base's never does. Nothing happens where its rate is 0."""
        drops = [m for n, m in self.model.named_modules() if ".lora_dropout." in n and isinstance(m, nn.Dropout)]
        try:
            for module in drops:
                module.train()
            yield
        finally:
            for module in drops:
                module.eval()

    @cached_property
    def context(self) -> int:
        """Longest sequence the model has positions for, in tokens."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return int(limit or self.tokenizer.model_max_length)

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the generation config's, the tokenizer's, the template's end of turn."""
        declared = self.model.generation_config.eos_token_id
        ids = declared if isinstance(declared, list) else [declared]
        return frozenset(i for i in (*ids, self.tokenizer.eos_token_id, end_of_turn(self.tokenizer)) if i is not None)

    def save(self, folder: str | Path) -> Artifact:
        """Write `folder` in one step: an adapter in PEFT's format or the whole model, and the tokenizer.

        Either loads in plain Transformers/PEFT. A folder that already holds these weights is left as it is;
        one that holds something else is never overwritten.

        Raises:
            UserError: `folder` is taken or cannot be written.
        """
        folder, digest = Path(folder), self.digest()
        artifact = Artifact("model" if self.adapter is None else "adapter", folder, digest)
        if folder.is_dir() and any(folder.iterdir()):
            if _record(folder).get("digest") == digest:
                return artifact
            raise UserError(f"{folder}: holds something else already; name another folder or remove this one")
        with staged(folder) as work, quiet():
            if isinstance(self.model, PeftModel):
                _save_adapter(self.model, work)
            else:
                self.model.save_pretrained(work)
            self.tokenizer.save_pretrained(work)
            record = {
                "source": self.source,
                "revision": self.revision,
                "base_digest": self.base_digest,
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "digest": digest,
            }
            (work / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        return artifact


def attach(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str,
    revision: str | None = None,
    base_digest: str | None = None,
    adapter: Lora | None = None,
    seed: int = 0,
) -> Policy:
    """A policy around a loaded model: every weight trainable, or a fresh adapter, which adds nothing yet (B = 0).

    `seed` fixes the adapter's A; the global random state is left as it was.

    Raises:
        UserError: `adapter.targets` names a layer that the model does not have, or the tokenizer has tokens that
            it does not have.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(f"{source}: its tokenizer has {len(tokenizer)} tokens, its model {rows} embeddings")
    model = model.eval()
    # No row is ever padded here. The mark would keep a pad token from learning, which may be the end of a turn.
    model.get_input_embeddings().padding_idx = None
    digest = base_digest or weights_digest(dict(model.named_parameters()))
    if adapter is None:
        fuse(model)
        return Policy(model.requires_grad_(True), tokenizer, source, digest, revision)
    targets, transposed = _targets(model, adapter)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=targets,
        fan_in_fan_out=transposed,
        revision=revision,
    )
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config).eval()
    fuse(adapted)
    return Policy(adapted, tokenizer, source, digest, revision)


def load(
    source: str,
    *,
    adapter: Lora | None = None,
    dtype: str = "float32",
    revision: str | None = None,
    chat_template: str | None = None,
    seed: int = 0,
    attn_implementation: str | None = None,
    device: str = "auto",
    compile: bool = False,
) -> Policy:
    """The policy that `source` names, in a process that `machine.tune` has set up.

    Args:
        source: what `resolve` takes, or a folder that `Policy.save` (or PEFT) wrote. A saved adapter is loaded
            onto its base and stays trainable; `adapter`, if given, must then describe it.
        adapter: train a low-rank adapter in place of all weights.
        dtype: precision of the weights. An adapter on bfloat16 weights is float32.
        chat_template: `chatml` or a Jinja file, in place of the model's own.
        seed: of the adapter's first values.
        attn_implementation: None is sdpa, or eager where the model's attention has what sdpa lacks (Gemma 2).
        device: `auto`, `cpu` or `cuda`.
        compile: see `place.compile_layers`.

    Raises:
        UserError: the source cannot be had or used; the base of an adapter changed; the template has no end
            of turn in this vocabulary; there is no such device, or no compiler.
    """
    tune()
    at = place.device(device)
    folder = resolve(source, revision)
    _refuse_reward_model(folder)

    def loaded(base: Path, origin: str) -> PreTrainedModel:
        model = base_model(base, origin, dtype, attn_implementation).to(at)
        if compile:
            place.compile_layers(model)
        return model

    if not (folder / "adapter_config.json").is_file():
        model, tokenizer = loaded(folder, source), read_tokenizer(folder, chat_template)
        return attach(model, tokenizer, source=lasting(source), revision=revision, adapter=adapter, seed=seed)
    return load_adapter(folder, loaded, dtype=dtype, chat_template=chat_template, asked=adapter)


def load_adapter(
    folder: Path,
    loaded: Callable[[Path, str], PreTrainedModel],
    *,
    dtype: str,
    chat_template: str | None = None,
    asked: Lora | None = None,
    turned: Callable[[PreTrainedModel], PreTrainedModel] = lambda base: base,
) -> Policy:
    """The adapter saved in `folder` on its base, trainable.

    Args:
        loaded: gives the base from its directory and its source.
        dtype: of `loaded`; the base's digest is compared where it was saved in the same.
        asked: what the adapter must be, if anything.
        turned: makes of the base what the adapter was trained on, where that is not the base itself.

    Raises:
        UserError: the base changed, or the adapter does not fit it or is not the one asked for.
    """
    record = _record(folder)
    origin, revision = _base_of(folder, record)
    base = resolve(origin, revision)
    model = loaded(base, origin)
    digest = weights_digest(dict(model.named_parameters()))
    if record and record["dtype"] == dtype and record["base_digest"] != digest:
        raise UserError(f"{folder}: was trained on other weights than {origin} now holds; restore that base")
    own = (folder / "tokenizer_config.json").is_file()
    tokenizer = read_tokenizer(folder if own else base, chat_template)
    if asked is not None:
        _refuse_other_adapter(model, asked, folder)
    with explained(folder), quiet():
        peft = PeftModel.from_pretrained(turned(model), str(folder), is_trainable=True).eval()
        fuse(peft)
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            stored = set(file.keys())
    refuse_nonfinite(folder, peft)
    policy = Policy(peft, tokenizer, lasting(origin), digest, revision)
    expected = {
        name.replace(".modules_to_save.default.", ".").replace(".default.", ".") for name in policy.parameters()
    }
    if stored != expected:  # PEFT would go on with a part of the adapter
        some = ", ".join(sorted(stored ^ expected)[:3])
        raise UserError(f"{folder}: its adapter does not fit {origin} (not in both: {some})")
    return policy


def outline(
    source: str,
    *,
    adapter: Lora | None = None,
    dtype: str = "float32",
    revision: str | None = None,
    chat_template: str | None = None,
) -> Policy:
    """What `load` would give, with tensors that have a shape and no values: for counting, and for rendering.

    Raises:
        UserError: as `load` does, but for what only the weights themselves show.
    """
    folder = base = resolve(source, revision)
    _refuse_reward_model(folder)
    if (folder / "adapter_config.json").is_file():
        base = resolve(*_base_of(folder, _record(folder)))
    with explained(base), quiet(), torch.device("meta"):
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    own = folder if (folder / "tokenizer_config.json").is_file() else base
    tokenizer = read_tokenizer(own, chat_template)
    if folder != base:
        if adapter is not None:
            _refuse_other_adapter(model, adapter, folder)
        saved = json_file(folder / "adapter_config.json")
        adapter = Lora(r=saved["r"], alpha=saved["lora_alpha"], targets=tuple(saved["target_modules"]))
    with torch.device("meta"):
        return attach(model, tokenizer, source=source, revision=revision, base_digest="none", adapter=adapter)


def merge(policy: Policy, tolerance: float = 1e-3) -> Policy:
    """Fold the adapter into a copy of the weights: the same function without an adapter, under a new digest.

    Raises:
        UserError: some log-probability on the probe texts moves by more than `tolerance` nats, as it does
            where the update is rounded away in bfloat16.
    """
    if not isinstance(policy.model, PeftModel):
        raise UserError(f"{policy.source}: has no adapter to merge")
    merged = copy.deepcopy(policy.model).merge_and_unload().eval().requires_grad_(True)
    worst = 0.0
    for text in PROBES:
        ids_1T = torch.tensor([policy.tokenizer(text)["input_ids"][: policy.context]], device=merged.device)
        with torch.no_grad():
            before, after = (m(ids_1T).logits.double().log_softmax(-1) for m in (policy.model, merged))
        worst = max(worst, float((before - after).abs().max()))
    if not worst <= tolerance:
        raise UserError(
            f"{policy.source}: merging moves log-probabilities by up to {worst:.2g} nats (allowed: "
            f"{tolerance:.2g}); load the model with dtype float32 and merge there, or keep the adapter"
        )
    return attach(merged, policy.tokenizer, source=policy.source, revision=policy.revision)


def _targets(model: PreTrainedModel, adapter: Lora) -> tuple[list[str], bool]:
    """Names of the layers that get an adapter, and whether their weights are transposed, as GPT-2's are."""
    head = model.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]: isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    names = sorted(linear) if adapter.targets == "all-linear" else list(adapter.targets)
    unknown = [name for name in names if name not in linear]
    if unknown:
        raise UserError(
            f"adapter.targets: no linear layer {', '.join(map(repr, unknown))} in this {model.config.model_type} "
            f"model; there are {', '.join(sorted(linear))}"
        )
    return names, linear[names[0]]


def _save_adapter(model: PeftModel, folder: Path) -> None:
    # False: the base's embeddings are never trained here, and the test for that would ask the hub.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's form to fill in
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"] = sorted(config["target_modules"])  # a set: its order would change from run to run
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    return json_file(path) if path.is_file() else {}


def _base_of(folder: Path, record: dict[str, Any]) -> tuple[str, str | None]:
    """Source and revision of a saved adapter's base: from our record, else from PEFT's config."""
    if record:
        return record["source"], record["revision"]
    config = json_file(folder / "adapter_config.json")
    if not config.get("base_model_name_or_path"):
        raise UserError(f"{folder}/adapter_config.json: does not name its base; set base_model_name_or_path")
    return config["base_model_name_or_path"], config.get("revision")


def lasting(source: str) -> str:
    """`source` in a form that holds from any working directory."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def base_model(
    folder: Path, source: str, dtype: str, attn_implementation: str | None = None, auto: Any = AutoModelForCausalLM
) -> PreTrainedModel:
    """What `folder` holds, read by Transformers' class `auto`, in `dtype`; `source` is where the folder came from."""
    with explained(folder), quiet():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model, report = auto.from_pretrained(
            folder,
            output_loading_info=True,
            dtype=getattr(torch, dtype),
            # Always said here: a config can name a kernel on the hub, which is code.
            attn_implementation=attn_implementation or ("sdpa" if kind._supports_sdpa else "eager"),
            use_safetensors=True,
            trust_remote_code=False,
        )
        if model.can_generate():
            try:
                model.generation_config.validate(strict=True)
            except ValueError:  # a temperature without do_sample, as many hub models have: saving would refuse it
                model.generation_config.do_sample = True
    if report["missing_keys"]:  # Transformers would go on with random numbers in their place
        some = ", ".join(sorted(report["missing_keys"])[:3])
        raise UserError(f"{folder}: its weights lack {len(report['missing_keys'])} tensors ({some}); fetch it again")
    refuse_nonfinite(folder, model)
    if is_hub_id(source):
        model.name_or_path = source  # what a saved adapter names as its base
    loaded: PreTrainedModel = model
    return loaded


def is_reward_model(folder: Path) -> bool:
    """Whether `folder` holds a reward model: a sequence classifier, or an adapter that was trained on one."""
    adapter = folder / "adapter_config.json"
    config = json_file(adapter if adapter.is_file() else folder / "config.json")
    kinds = config.get("architectures") or []
    return config.get("task_type") == "SEQ_CLS" or any("SequenceClassification" in str(kind) for kind in kinds)


def _refuse_reward_model(folder: Path) -> None:
    """Transformers would give one with tied embeddings an output layer, and it would write nonsense."""
    if is_reward_model(folder):
        raise UserError(f"{folder}: is a reward model, which scores text and writes none; name a language model")


def refuse_nonfinite(folder: Path, model: nn.Module) -> None:
    """One NaN in the weights makes every answer NaN, and then each thing that reads an answer fails in its own way."""
    broken = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if broken:
        raise UserError(f"{folder}: {len(broken)} of its tensors hold NaN or infinity ({broken[0]}); fetch it again")


def read_tokenizer(folder: Path, chat_template: str | None) -> PreTrainedTokenizerBase:
    if not any(path.name.startswith(("tokenizer", "vocab", "spiece")) for path in folder.iterdir()):
        raise UserError(f"{folder}: has no tokenizer (tokenizer.json is missing); copy the one of the model's release")
    with explained(folder), quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if chat_template is not None:
        with_template(tokenizer, chat_template)
    return tokenizer


def _refuse_other_adapter(base: PreTrainedModel, asked: Lora, folder: Path) -> None:
    config = json_file(folder / "adapter_config.json")
    r, alpha, targets = config["r"], config["lora_alpha"], sorted(config["target_modules"])
    if (r, alpha, targets) != (asked.r, asked.alpha, sorted(_targets(base, asked)[0])):
        raise UserError(
            f"{folder}: its adapter has r={r}, alpha={alpha}, targets {', '.join(targets)}; ask for the same, leave "
            "`adapter` out, or merge it first"
        )


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """What the loaders raise on broken files, said as the user's error it is."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: cannot be loaded ({why}); fetch or save it again") from error
