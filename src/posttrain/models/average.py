"""One model from several of the same architecture: the average of their weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.models.disk import staged
from posttrain.models.policy import RECORD, is_reward_model, load
from posttrain.models.reward import load_reward_model
from posttrain.models.source import json_file, resolve
from posttrain.records import Artifact, UserError


def average(sources: Sequence[str], folder: Path) -> Artifact:
    """Write to `folder` the mean of saved models that were trained from one (model soups, Wortsman et al., 2203.05482).

    Of reward models it is WARM (Rame et al., 2401.12187): what single ones were fooled by, their average mostly is not,
    at the cost of one. Adapters are averaged in what they add to the base, W + mean(s B A): the mean of the products
    is not the product of the means, so the result holds all of them side by side, and its rank is the sum of theirs.
    Departure from WARM: their heads were drawn by each one's seed, where the paper starts all from one that was fitted.

    Raises:
        UserError: there are fewer than two, or they are not of one architecture, precision and base.
    """
    if len(sources) < 2:
        raise UserError(f"average: {len(sources)} models; give at least two")
    folders = [resolve(source) for source in sources]
    name = "adapter_model.safetensors" if (folders[0] / "adapter_config.json").is_file() else "model.safetensors"
    for place in folders:
        if not (place / name).is_file():
            raise UserError(
                f"{place}: has no {name} as {folders[0]} has; average models of one kind, saved in one file"
            )
    weights = [load_file(place / name) for place in folders]
    adapter = name.startswith("adapter")
    for place, other in zip(folders[1:], weights[1:], strict=True):
        _refuse_other(folders[0], weights[0], place, other, adapter)
    with staged(folder) as work:
        for path in folders[0].iterdir():
            if path.is_file() and path.name != name:
                shutil.copy(path, work)
        if adapter:
            config = json_file(work / "adapter_config.json")
            if config.get("use_rslora") or config.get("rank_pattern") or config.get("alpha_pattern"):
                raise UserError(f"{folders[0]}: scales its layers in ways of its own; only plain adapters are averaged")
            config |= {"r": config["r"] * len(sources), "lora_alpha": config["lora_alpha"] * len(sources)}
            (work / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        mean = {key: _mean(key, [each[key] for each in weights]) for key in weights[0]}
        save_file(mean, work / name, {"format": "pt"})
        record = json_file(work / RECORD) if (work / RECORD).is_file() else {}
        dtype = record.get("dtype") or str(next(iter(mean.values())).dtype).removeprefix("torch.")
        digest = (load_reward_model if is_reward_model(work) else load)(str(work), dtype=dtype).digest()
        (work / RECORD).write_text(json.dumps(record | {"digest": digest}, indent=2) + "\n")
    return Artifact("adapter" if adapter else "model", folder, digest)


def _mean(key: str, tensors: Sequence[Tensor]) -> Tensor:
    """Summed in float64 and rounded once. The A of a LoRA pair are stacked, and its B side by side, each one's share
    of the mean in it."""
    if ".lora_A." in key:
        return torch.cat(list(tensors), 0)
    if ".lora_B." in key:
        return torch.cat(list(tensors), 1) / len(tensors)
    total = torch.stack([tensor.double() for tensor in tensors]).mean(0)
    return total.to(tensors[0].dtype)


def _refuse_other(first: Path, ours: dict[str, Tensor], place: Path, theirs: dict[str, Tensor], adapter: bool) -> None:
    forms = [{key: (tensor.shape, tensor.dtype) for key, tensor in each.items()} for each in (ours, theirs)]
    if forms[0] != forms[1]:
        differ = sorted(key for key in ours.keys() | theirs.keys() if forms[0].get(key) != forms[1].get(key))
        raise UserError(f"{place}: is of another architecture or precision than {first} ({differ[0]} differs)")
    if adapter:
        for file, key, what in (
            ("adapter_config.json", "lora_alpha", "has another alpha"),
            (RECORD, "base_digest", "stands on other weights"),
        ):
            if json_file(first / file).get(key) != json_file(place / file).get(key):
                raise UserError(f"{place}: {what} than {first}; average adapters of one base that were trained alike")
