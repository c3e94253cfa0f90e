"""What learning from rewards does for the default model: the rows of docs/results.md, docs/measured/rewards.json.

    python benchmarks/results.py --data DATA --only rlvr-0 rlvr-1     # one after the other; without --only all
    python benchmarks/results.py --data DATA --out docs/measured/rewards.json
    python benchmarks/plots.py

DATA holds two public sets, each in a folder: in instruct_rasbt the two .json files of ch07 of
github.com/rasbt/LLMs-from-scratch (instruction-data, instruction-data-with-preference), in hh_rlhf_harmless_test the
harmless-base/test.jsonl.gz of github.com/anthropics/hh-rlhf. Runs stand in --folder: what is finished there is not run
again, what was stopped goes on, and every row is made from what they left. OMP_NUM_THREADS=1 before it, and two can run
side by side.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from measured import Row, machine, parser, report

from posttrain.credit.batch import as_row
from posttrain.data.chat import Renderer
from posttrain.data.prepare import prompt_key
from posttrain.data.sources import read
from posttrain.evals import suites
from posttrain.evals.stats import Interval, mean_interval, wilson
from posttrain.forest import Row as Tokens
from posttrain.forest import pack, split
from posttrain.models.disk import read_json, read_rows, write_json, write_rows
from posttrain.models.policy import Policy, load
from posttrain.models.reward import load_reward_model
from posttrain.models.student import half_depth
from posttrain.pipeline.run import run
from posttrain.pipeline.stages import Job, Say, Trainer, stage_data, train_here
from posttrain.recipe.blocks import Sampling, Source
from posttrain.recipe.load import load as load_recipe
from posttrain.recipe.load import resolved
from posttrain.recipe.schema import Recipe
from posttrain.records import Example, Ledger, derive
from posttrain.rewards.model import model_scorer
from posttrain.rewards.verifier import verify
from posttrain.sampling.local import LocalSampler
from posttrain.training.batch import chosen
from posttrain.training.distill import token_divergences
from posttrain.training.reward import hold_out

RECIPES = Path(__file__).resolve().parent.parent / "recipes" / "results"
PAIRS = "instruct_rasbt/instruction-data-with-preference.json"
ANSWERS = "instruct_rasbt/instruction-data.json"
DIALOGUES = "hh_rlhf_harmless_test/test.jsonl.gz"
ALIGNED = {"dpo": "DPO", "kto": "KTO", "orpo": "ORPO"}
LEARNERS = {"grpo": "GRPO", "rloo": "RLOO", "reinforce": "REINFORCE++", "ppo": "PPO", "rft": "RFT"}
SEEDS = (0, 1, 2)
POINTS = 6
"""How often a stage's model is looked at while it learns; the last time at its end."""
SAMPLES = 4
"""Answers to each held-out sum at such a point, at temperature 1."""
LONGEST = 64
"""Tokens of an answer that is judged."""
PRIOR = 3.0
"""Standard deviation of the normal prior on the coefficients of `at_equal_length`."""
TIME, THREADS = 2400, 2
"""Seconds that an experiment may take, with so many threads; with one thread half of its time counts."""
QUICK: dict[str, dict[str, Any]] = {
    "harmlessness": {"stages.reward.steps": 2},
    "politeness": {
        **{f"stages.{name}.steps": 2 for name in ("judge", *ALIGNED)},
        "evals.retention": {"rows": 2, "max_new_tokens": 4},
    },
    "rlvr": {
        **{f"stages.{name}.{key}": n for name in LEARNERS if name != "rft" for key, n in (("batch_size", 2), ("n", 2))},
        **{f"stages.{name}.steps": POINTS for name in ("warmup", *LEARNERS)},
        **{f"stages.{name}.data.sources.0.rows": 80 for name in ("warmup", *LEARNERS)},
        "stages.rft.prompts": 64,
        "stages.rft.sampling.max_new_tokens": 64,
        "stages.rft.at_least": 0,
        "evals.suites.sums.source.rows": 8,
    },
    "distill": {
        "stages.start.steps": POINTS,
        "stages.off.steps": POINTS,
        "stages.on.steps": POINTS,
        "stages.on.sampling.max_new_tokens": 8,
    },
}
"""Of each recipe what makes it end in seconds, on a model that knows nothing."""


class Work(NamedTuple):
    """Where an experiment finds its data, and where it leaves what it found."""

    folder: Path
    data: Path
    model: str
    quick: bool

    def settings(self, name: str, given: Mapping[str, Any]) -> list[str]:
        quick = QUICK[name] if self.quick else {}
        return [f"{key}={json.dumps(value)}" for key, value in ({"model.source": self.model} | quick | given).items()]

    def recipe(self, name: str, given: Mapping[str, Any]) -> Recipe:
        return resolved(load_recipe(RECIPES / f"{name}.yaml", self.settings(name, given)), RECIPES)

    def run(self, name: str, given: Mapping[str, Any], trainer: Trainer = train_here) -> None:
        run(RECIPES / f"{name}.yaml", self.settings(name, given), self.folder / "run", trainer)


# The experiments


def harmlessness(work: Work) -> None:
    work.run("harmlessness", {"stages.reward.data.sources.0.source": str((work.data / DIALOGUES).resolve())})


def politeness(work: Work) -> None:
    """Seven elevenths of the pairs for the reward model, which holds out some of them; the others for alignment."""
    for_reward, for_alignment = parted(read(Source(source=str(work.data / PAIRS))).examples, 7 / 11)
    files = {name: (work.folder / f"{name}.jsonl").resolve() for name in ("judged", "pairs", "labels")}
    write_rows(files["judged"], [as_pair(e) for e in for_reward if e.rejected])
    write_rows(files["pairs"], [as_pair(e) for e in for_alignment if e.rejected])
    write_rows(files["labels"], [row for e in for_alignment if e.rejected for row in as_labelled(e)])
    sources = {"judge": "judged", "dpo": "pairs", "kto": "labels", "orpo": "pairs"}
    given = {f"stages.{stage}.data.sources.0.source": str(files[name]) for stage, name in sources.items()}
    work.run("politeness", given)
    judge(work, work.recipe("politeness", given))


def judge(work: Work, recipe: Recipe) -> None:
    """What the reward model says of each model's answers to the prompts of the pairs that it was not trained on."""
    stages = work.folder / "run" / "stages"
    asked: list[Example] = []
    for name, source in {"base": recipe.model.source, **{s: str(stages / s / "artifact") for s in ALIGNED}}.items():
        if (work.folder / f"answers-{name}.jsonl").exists():
            continue
        policy = load(source)
        renderer = Renderer(policy.tokenizer)
        if not asked:
            _, held = hold_out(recipe.stages[0], stage_data(recipe.stages[0], policy, frozenset()))
            asked = list({prompt_key(row.example): row.example for row in held}.values())
            score = model_scorer(load_reward_model(str(stages / "judge" / "artifact")), renderer)
        greedy = Sampling(temperature=0, max_new_tokens=8 if work.quick else LONGEST)
        rollouts, _ = LocalSampler(policy, renderer)(asked, 1, greedy, seed=0)
        rows = [
            {"prompt": e.prompt[-1]["content"], "text": r.text, "tokens": len(r.ids), "reward": s.value}
            for e, r, s in zip(asked, rollouts, score(rollouts), strict=True)
        ]
        write_rows(work.folder / f"answers-{name}.jsonl", rows)


def rlvr(work: Work, seed: int) -> None:
    exam = suites.items(work.recipe("rlvr", {}).evals.suites[0])

    def accuracy(policy: Policy) -> dict[str, Any]:
        ask = LocalSampler(policy, Renderer(policy.tokenizer))
        rollouts, _ = ask(exam, SAMPLES, Sampling(max_new_tokens=12), derive(seed, "exam"))
        return {"accuracy": float(np.mean([score.value == 1 for score in verify(rollouts)]))}

    work.run("rlvr", {"seed": seed}, looked_at(accuracy, work.folder / "points.jsonl"))


def distill(work: Work) -> None:
    student = work.folder / "student"
    if not student.exists():
        half_depth(work.model, student)
    learned, held = parted(read(Source(source=str(work.data / ANSWERS))).examples, 0.95)
    file = (work.folder / "answers.jsonl").resolve()
    write_rows(file, [{"prompt": list(e.prompt), "completion": list(e.completion)} for e in learned])
    teacher = load(work.model)
    renderer = Renderer(teacher.tokenizer)
    said = [chosen(row) for example in held for row in renderer.render(example)]
    own_length = Sampling(max_new_tokens=8 if work.quick else 48)

    def apart(policy: Policy) -> dict[str, Any]:
        rollouts, _ = LocalSampler(policy, renderer)(held, 1, own_length, seed=0)
        forward = distances(policy, teacher, said, 0.0)
        own = distances(policy, teacher, [as_row(r) for r in rollouts], 1.0)
        return {"said": [kl for kl, _ in forward], "nll": [nll for _, nll in forward], "own": [kl for kl, _ in own]}

    given: dict[str, Any] = {"model.source": str(student.resolve())}
    for stage in ("start", "off", "on"):
        given |= {
            f"stages.{stage}.teacher.source": work.model,
            f"stages.{stage}.data.sources.0.source": str(file),
        }
    work.run("distill", given, looked_at(apart, work.folder / "points.jsonl"))


DOING: dict[str, Callable[[Work], None]] = {
    "politeness": politeness,
    "harmlessness": harmlessness,
    **{f"rlvr-{seed}": partial(rlvr, seed=seed) for seed in SEEDS},
    "distill": distill,
}


# Their parts


def parted(examples: Sequence[Example], share: float) -> tuple[list[Example], list[Example]]:
    """The first `share` of the prompts in a shuffled order, and the others: no prompt is on both sides."""
    keys = sorted({prompt_key(e) for e in examples})
    random.Random(0).shuffle(keys)
    first = set(keys[: round(share * len(keys))])
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        sides[prompt_key(example) not in first].append(example)
    return sides


def as_pair(example: Example) -> Row:
    return {"prompt": list(example.prompt), "chosen": list(example.completion), "rejected": list(example.rejected)}


def as_labelled(example: Example) -> list[Row]:
    prompt = list(example.prompt)
    sides = ((example.completion, True), (example.rejected, False))
    return [{"prompt": prompt, "completion": list(side), "label": label} for side, label in sides]


def looked_at(look: Callable[[Policy], dict[str, Any]], path: Path) -> Trainer:
    """Trains here, and adds to `path` what `look` finds after a part of a stage's steps, `POINTS` times in each."""

    def trainer(job: Job, start: Policy, say: Say) -> tuple[Ledger, dict[str, Any]]:
        def step(stage: Any, row: dict[str, Any]) -> None:
            say.step(stage, row)
            done = row["step"] + 1
            if done * POINTS % stage.steps == 0:
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"stage": stage.id, "step": done, **look(start)}) + "\n")

        return train_here(job, start, Say(say.line, step))

    return trainer


@torch.no_grad()
def distances(student: Policy, teacher: Policy, rows: Sequence[Tokens], beta: float) -> list[tuple[float, float]]:
    """For each row the divergence of student and teacher (`losses.jsd`), and the student's NLL; nats, token means."""
    found = [(math.nan, math.nan)] * len(rows)
    for members in split(rows, [(i,) for i in range(len(rows))], 1024):
        forest = pack([rows[i] for i in members])
        out_2T = token_divergences(student.model, teacher.model, forest, beta=beta, temperature=1.0)
        for i, (start, stop) in zip(members, forest.spans, strict=True):
            kl, logp = out_2T[:, start:stop][:, forest.target_T[start:stop]].mean(1).tolist()
            found[i] = kl, -logp
    return found


def at_equal_length(won_P: Sequence[float], longer_P: Sequence[float]) -> tuple[float, Interval]:
    """The win rate that is left where both answers are of one length, and its 95 % interval.

    A logistic regression of who won (1, 0, or 1/2 for a tie) on tanh of the difference in length over its standard
    deviation, taken at 0, as length-controlled AlpacaEval has it (Dubois et al., 2404.04475). Departures: no term for
    the difficulty of a prompt; a normal prior of deviation `PRIOR` on both coefficients, without which one that always
    wins would have none. Where one side is always the longer one, this is an extrapolation, and no more.
    """
    won, longer = np.asarray(won_P, float), np.asarray(longer_P, float)
    spread = float(longer.std()) or 1.0
    x_P2 = np.stack([np.ones_like(longer), np.tanh(longer / spread)], 1)
    w_2 = np.zeros(2)
    for _ in range(50):  # Newton's method on a strictly convex function
        p_P = 1 / (1 + np.exp(-x_P2 @ w_2))
        curvature_22 = x_P2.T @ (x_P2 * (p_P * (1 - p_P))[:, None]) + np.eye(2) / PRIOR**2
        w_2 += np.linalg.solve(curvature_22, x_P2.T @ (won - p_P) - w_2 / PRIOR**2)
    half = 1.96 * math.sqrt(np.linalg.inv(curvature_22)[0, 0])
    rate, low, high = (1 / (1 + math.exp(-z)) for z in (w_2[0], w_2[0] - half, w_2[0] + half))
    return rate, Interval(low, high)


def points(folder: Path) -> dict[str, dict[int, Row]]:
    """What was found after which step of each stage; a run that went on may have looked twice, at the same."""
    found: dict[str, dict[int, Row]] = {}
    for row in read_rows(folder / "points.jsonl"):
        found.setdefault(row["stage"], {})[row["step"]] = row
    return found


def spent(folder: Path, stage: str, each: Callable[[Row], float]) -> list[float]:
    """Tokens after each number of steps of a stage, none included; `each` says how many those of a step are."""
    rows = read_rows(folder / "run" / "stages" / stage / "metrics.jsonl")
    return [0.0, *np.cumsum([each(row) for row in rows]).tolist()]


def interpolated(tokens: float, xs: Sequence[float], ys: Sequence[Any]) -> Any:
    """Between the two looks that are nearest: the value after so many tokens, or a value for each item."""
    columns = np.asarray(ys, float)
    if columns.ndim == 1:
        return float(np.interp(tokens, xs, columns))
    return [float(np.interp(tokens, xs, column)) for column in columns.T]


# Rows


def harmlessness_rows(folder: Path) -> list[Row]:
    found = read_json(folder / "run" / "stages" / "reward" / "stage.json")["facts"]["held_out"]
    row = _share(f"harmlessness: held-out pairs that the reward model gets right ({found['n']})", found)
    return [{**row, "at_least": 0.5, "met": found["interval"][0] > 0.5}, _time("harmlessness", folder)]


def politeness_rows(folder: Path) -> list[Row]:
    found = read_json(folder / "run" / "stages" / "judge" / "stage.json")["facts"]["held_out"]
    row = _share(f"politeness: held-out pairs that the reward model gets right ({found['n']})", found)
    rows = [{**row, "at_least": 0.9, "met": found["accuracy"] >= 0.9}]
    answers = {name: read_rows(folder / f"answers-{name}.jsonl") for name in ("base", *ALIGNED)}
    drift = {row["stage"]: row for row in read_json(folder / "run" / "evals.json")["retention"]}
    rows.append(_tokens("politeness: length of the base's answer", answers["base"]))
    with np.errstate(invalid="ignore"):  # answers or rewards that are all alike have none
        together = np.corrcoef([[a["tokens"], a["reward"]] for a in answers["base"]], rowvar=False)[0, 1]
    what = "politeness: correlation of reward and length, answers of the base"
    if np.isfinite(together):
        rows.append({"what": what, "value": float(together), "unit": "(Pearson)"})
    for stage, name in ALIGNED.items():
        pairs = list(zip(answers[stage], answers["base"], strict=True))
        won = [(float(np.sign(a["reward"] - b["reward"])) + 1) / 2 for a, b in pairs]
        longer = [a["tokens"] - b["tokens"] for a, b in pairs]
        rate, interval = at_equal_length(won, longer)
        what = f"politeness, {name}: preferred to the base"
        wins = {"accuracy": float(np.mean(won)), "interval": wilson(round(sum(won)), len(won))}
        rows += [
            _share(f"{what} ({len(won)} prompts)", wins),
            _share(f"{what}, at equal length", {"accuracy": rate, "interval": interval}),
            _tokens(f"politeness, {name}: length of an answer", answers[stage]),
            {
                "what": f"politeness, {name}: KL from the base on {drift[stage]['n']} general prompts",
                "value": drift[stage]["kl"],
                "interval": drift[stage]["interval"],
                "unit": "nats/token",
            },
        ]
    return [*rows, _time("politeness", folder)]


def rlvr_rows(*folders: Path) -> list[Row]:
    tokens, curves = rlvr_curves(folders)
    exams = [{s["stage"]: s["score"] for s in read_json(f / "run" / "evals.json")["suites"]} for f in folders]
    seeds = f"{len(folders)} seeds"

    def share(what: str, values: Sequence[float]) -> Row:
        return _seeds(f"sums, {what} ({seeds})", "share", values)

    rows = [share("start: accuracy, greedy", [exam["warmup"] for exam in exams])]
    rows.append(share("start: accuracy at temperature 1", [curve[0] for curve in curves["grpo"]]))
    for stage, name in LEARNERS.items():
        at_end = [curve[-1] for curve in curves[stage]]
        rows.append(share(f"{name}: accuracy at temperature 1 after as many sampled tokens", at_end))
        rows.append(share(f"{name}: accuracy at its end, greedy", [exam[stage] for exam in exams]))
        seconds = [read_json(f / "run" / "stages" / stage / "stage.json")["seconds"] for f in folders]
        rows.append(_seeds(f"sums, {name}: time to train ({seeds})", "s", seconds))
    rows.append(_seeds("sums: sampled tokens at which they are compared", "tokens", [tokens]))
    return [*rows, _time("sums", *folders)]


def rlvr_curves(folders: Sequence[Path]) -> tuple[float, dict[str, list[list[float]]]]:
    """The sampled tokens that every run came to; of each method and seed the accuracies on an even grid to there."""
    found = [{stage: _learned(folder, stage) for stage in LEARNERS} for folder in folders]
    tokens = min(xs[-1] for curves in found for xs, _ in curves.values())
    grid = [tokens * k / POINTS for k in range(POINTS + 1)]
    return tokens, {s: [[interpolated(x, *curves[s]) for x in grid] for curves in found] for s in LEARNERS}


def _learned(folder: Path, stage: str) -> tuple[list[float], list[float]]:
    """Sampled tokens and accuracy at the start and at each look."""
    looks = points(folder)
    [config] = [s for s in read_json(folder / "run" / "resolved.json")["stages"] if s["id"] == stage]
    answers = config.get("prompts", config["batch_size"]) * config["n"]
    sampled = spent(folder, stage, lambda row: answers * row.get("length", 0))  # it stands where answers were drawn
    steps = sorted(looks[stage])
    first = looks["warmup"][max(looks["warmup"])]["accuracy"]
    return [0.0, *(sampled[s] for s in steps)], [first, *(looks[stage][s]["accuracy"] for s in steps)]


def distill_rows(folder: Path) -> list[Row]:
    looks = points(folder)
    start = looks["start"][max(looks["start"])]
    size = {s["id"]: s["batch_size"] for s in read_json(folder / "run" / "resolved.json")["stages"]}
    names = {"off": "on the data's answers", "on": "on its own answers"}
    xs = {}
    for stage in names:
        trained = spent(folder, stage, lambda row, n=size[stage]: row["tokens"] - n * row.get("length", 0))
        xs[stage] = [0.0, *(trained[step] for step in sorted(looks[stage]))]
    tokens = min(x[-1] for x in xs.values())
    kinds = {
        "said": "KL(teacher, student) along the data's answers",
        "own": "KL(student, teacher) along its own answers",
        "nll": "NLL of the data's answers",
    }
    rows = []
    for kind, what in kinds.items():
        found = {"before": start[kind]}
        for stage, name in names.items():
            found[f"taught {name}"] = interpolated(
                tokens, xs[stage], [start[kind], *(looks[stage][s][kind] for s in sorted(looks[stage]))]
            )
        for name, values in found.items():
            interval = list(mean_interval(values))
            whole = f"half depth, {name}: {what} ({len(values)} prompts)"
            rows.append({"what": whole, "value": float(np.mean(values)), "interval": interval, "unit": "nats/token"})
    rows.append({"what": "half depth: tokens at which both are compared", "value": tokens, "unit": "tokens"})
    return [*rows, _time("half depth", folder)]


MADE: dict[str, tuple[tuple[str, ...], Callable[..., list[Row]]]] = {
    "politeness": (("politeness",), politeness_rows),
    "harmlessness": (("harmlessness",), harmlessness_rows),
    "rlvr": (tuple(f"rlvr-{seed}" for seed in SEEDS), rlvr_rows),
    "distill": (("distill",), distill_rows),
}
"""Of which experiments a part of the table is made."""


def _share(what: str, found: Mapping[str, Any]) -> Row:
    return {"what": what, "value": found["accuracy"], "interval": list(found["interval"]), "unit": "share"}


def _tokens(what: str, answers: Sequence[Row]) -> Row:
    lengths = [a["tokens"] for a in answers]
    return {"what": what, "value": float(np.mean(lengths)), "interval": list(mean_interval(lengths)), "unit": "tokens"}


def _seeds(what: str, unit: str, values: Sequence[float]) -> Row:
    return {"what": what, "value": float(np.mean(values)), "spread": [min(values), max(values)], "unit": unit}


def _time(what: str, *folders: Path) -> Row:
    seconds = sum(read_json(folder / "done.json")["thread_seconds"] for folder in folders) / THREADS
    what = f"{what}: time of two threads in all"
    return {"what": what, "value": seconds, "unit": "s", "at_most": TIME, "met": seconds <= TIME}


# The command


def do(name: str, work: Work) -> None:
    """The experiment, unless it is done. Its time is that of all attempts."""
    if (work.folder / "done.json").exists():
        print(f"{name}: done already")
        return
    work.folder.mkdir(parents=True, exist_ok=True)
    before = (read_json(work.folder / "begun.json") or {"thread_seconds": 0.0})["thread_seconds"]
    began = time.time()
    try:
        DOING[name](work)
    finally:
        spent_now = (time.time() - began) * torch.get_num_threads()
        write_json(work.folder / "begun.json", {"thread_seconds": before + spent_now})
    (work.folder / "begun.json").rename(work.folder / "done.json")


def rows_of(folder: Path) -> list[Row]:
    """The rows of all that is done in `folder`."""
    rows = []
    for names, make in MADE.values():
        if all((folder / name / "done.json").exists() for name in names):
            command = f"python benchmarks/results.py --data DATA --only {' '.join(names)}"
            made = make(*(folder / name for name in names))
            rows += [{**row, "command": command, "machine": machine()} for row in made]
    return rows


def main() -> None:
    options = parser(__doc__, "--model", "--quick", "--out")
    options.add_argument("--data", type=Path, required=True, help="where the two public sets are")
    options.add_argument("--only", nargs="+", choices=DOING, default=list(DOING), help="which experiments")
    options.add_argument("--folder", type=Path, default=Path("runs/results"), help="where the runs are kept")
    args: argparse.Namespace = options.parse_args()
    for name in args.only:
        do(name, Work(args.folder / name, args.data, args.model, args.quick))
    rows = rows_of(args.folder)
    if not rows:
        return
    report(rows, args.out)
    trained = [args.folder / name for name in MADE["rlvr"][0]]
    if args.out and all((folder / "done.json").exists() for folder in trained):
        tokens, curves = rlvr_curves(trained)
        named = {LEARNERS[stage]: seeds for stage, seeds in curves.items()}
        write_json(args.out.with_name("rlvr.json"), {"tokens": tokens, "curves": named})


if __name__ == "__main__":
    main()
