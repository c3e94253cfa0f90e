"""Files: every format, every way they break, and the real sets."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posttrain.data import sources
from posttrain.data.sources import read
from posttrain.recipe.blocks import Source
from posttrain.records import UserError

ROWS = [{"prompt": f"q{i} «ü\u2028»", "completion": f"a{i}"} for i in range(70)]


def write(path: Path, text: str | bytes) -> str:
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def lines(*rows: object) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)


def table(delimiter: str, path: Path) -> bytes:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ROWS[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    return path.read_bytes()


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_all_formats_give_the_same_rows(tmp_path: Path, kind: str, gz: str) -> None:
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "raw")
        data = (tmp_path / "raw").read_bytes()
    elif kind in ("csv", "tsv"):
        data = table("," if kind == "csv" else "\t", tmp_path / "raw")
    else:
        data = (lines(*ROWS) if kind == "jsonl" else json.dumps(ROWS, indent=1, ensure_ascii=False)).encode()
    loaded = read(Source(source=write(tmp_path / f"d.{kind}{gz}", data)))
    assert [(e.prompt[0]["content"], e.completion[0]["content"]) for e in loaded.examples] == [
        (row["prompt"], row["completion"]) for row in ROWS
    ]
    where = {"jsonl": ":70", "json": ":278", "csv": ":71", "tsv": ":71", "parquet": "[69]"}[kind]
    assert loaded.examples[-1].id == f"d.{kind}{gz}{where}"
    assert (loaded.report.shape, loaded.report.rows, loaded.report.bad) == ("prompt_completion", 70, 0)


def test_text_is_one_document_a_line(tmp_path: Path) -> None:
    loaded = read(Source(source=write(tmp_path / "d.txt", "one\r\n\n two\x85 \nthree")))
    assert [(e.id, e.text) for e in loaded.examples] == [
        ("d.txt:1", "one"),
        ("d.txt:3", " two\x85 "),
        ("d.txt:4", "three"),
    ]


GOOD = {"prompt": "q", "completion": "a"}
HOSTILE = {
    "UTF-8": b'{"prompt": "\xff", "completion": "a"}',
    "NUL": b'{"prompt": "q\\u0000", "completion": "a"}',
    "control": b'{"prompt": "q\0", "completion": "a"}',
    "NaN": b'{"prompt": "q", "completion": "a", "x": NaN}',
    "deep": b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b', "completion": "a"}',
    "surrogate": b'{"prompt": "\\ud800", "completion": "a"}',
    "digits": b'{"prompt": ' + b"9" * 5000 + b', "completion": "a"}',
    "cut": b'{"prompt": "q", "compl": }',
    "scalar": b"3",
}


@pytest.mark.parametrize("kind", ["jsonl", "json"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_row_is_one_bad_row_with_its_line(tmp_path: Path, kind: str, name: str) -> None:
    good = json.dumps(GOOD).encode()
    joined = (
        b"\n".join([good, HOSTILE[name], good])
        if kind == "jsonl"
        else b"[" + b",\n".join([good, HOSTILE[name], good]) + b"]"
    )
    loaded = read(Source(source=write(tmp_path / f"d.{kind}", joined)))
    assert [e.id for e in loaded.examples] == [f"d.{kind}:1", f"d.{kind}:3"]
    assert (loaded.report.rows, loaded.report.bad) == (3, 1)
    (bad,) = loaded.report.bad_rows
    assert bad.where == f"d.{kind}:2"


def test_an_overlong_line_is_skipped_without_being_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_LINE", 1000)
    path = write(tmp_path / "d.jsonl", lines(GOOD, {"prompt": "q" * 5000, "completion": "a"}, GOOD))
    loaded = read(Source(source=path))
    assert [e.id for e in loaded.examples] == ["d.jsonl:1", "d.jsonl:3"]
    assert "longer" in loaded.report.bad_rows[0].why


@pytest.mark.parametrize(
    ("row", "why"), [("1,2,3", "3 cells"), ("only", "1 cells"), ("a\0,b", "NUL"), ('"x"y,b', "not valid CSV")]
)
def test_bad_csv_rows(tmp_path: Path, row: str, why: str) -> None:
    path = write(tmp_path / "d.csv", f'\ufeffprompt,completion\n"q\nr",a\n{row}\nq,a\n')
    loaded = read(Source(source=path))
    assert [e.id for e in loaded.examples] == ["d.csv:2", "d.csv:5"]
    (bad,) = loaded.report.bad_rows
    assert bad.where == "d.csv:4"
    assert why in bad.why


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("d.jsonl", "", "empty"),
        ("d.json", " ", "empty"),
        ("d.json", "[]", "empty"),
        ("d.json", "3", "list of rows"),
        ("d.json", '[{"prompt": "q", "completion": "a"}, {"prompt"', "d.json:1: .* never ends"),
        ("d.csv", 'prompt,completion\nq,a\n"q,a\n', "d.csv:3: a quoted cell"),
        ("d.csv", "a,a\n1,2\n", "twice"),
        ("d.parquet", "nonsense", "Parquet"),
        ("d.xml", "<a/>", "unknown kind of file '.xml'"),
        ("d.jsonl", '{"foo": 1}\n', "columns foo.*prompt_completion"),
    ],
)
def test_a_source_that_cannot_be_read_says_so(tmp_path: Path, name: str, text: str, why: str) -> None:
    with pytest.raises(UserError, match=f"(?s){why}"):
        read(Source(source=write(tmp_path / name, text)))


def test_missing_files_name_what_is_near(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", lines(GOOD))
    with pytest.raises(UserError, match=r"no such file; did you mean train\.jsonl"):
        read(Source(source=str(tmp_path / "trian.jsonl")))
    with pytest.raises(UserError, match="there is no folder"):
        read(Source(source=str(tmp_path / "none" / "train.jsonl")))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines(*ROWS).encode())[:-20])
    with pytest.raises(UserError, match="broken gzip"):
        read(Source(source=str(tmp_path / "d.jsonl.gz")))


def test_rows_and_shape_of_a_source(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", lines(*[{**row, "text": "t"} for row in ROWS]))
    assert len(read(Source(source=path, rows=65)).examples) == 65
    assert read(Source(source=path, shape="text")).examples[0].text == "t"
    with pytest.raises(UserError, match="did you mean prompt_completion"):
        read(Source(source=path, shape="prompt_completions"))


def test_hub_offline_is_a_message() -> None:
    with pytest.raises(UserError, match=r"hub:no/such.*cannot be loaded from the hub"):
        read(Source(source="hub:no/such"))
    with pytest.raises(UserError, match="no key 'nam'"):
        read(Source(source="hub:no/such", config={"nam": "x"}))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=60) | st.text(alphabet='[]{}",:\\ \n1aN', max_size=40).map(str.encode),
    kind=st.sampled_from([*sources.READERS]),
)
def test_no_bytes_crash_a_reader(tmp_path: Path, data: bytes, kind: str) -> None:
    path = tmp_path / f"d{kind}"
    path.write_bytes(data)
    with contextlib.suppress(UserError):
        assert read(Source(source=str(path))).report.rows > 0


@pytest.mark.parametrize(
    ("file", "shape", "used", "bad"),
    [
        ("llamafactory_demo/alpaca_en_demo.json.gz", "alpaca", 999, 0),
        ("llamafactory_demo/alpaca_zh_demo.json", "alpaca", 1000, 0),
        ("llamafactory_demo/identity.json", "alpaca", 91, 0),
        ("llamafactory_demo/dpo_en_demo.json.gz", "sharegpt_preference", 300, 0),
        ("llamafactory_demo/dpo_zh_demo.json.gz", "sharegpt_preference", 300, 0),
        ("llamafactory_demo/kto_en_demo.json.gz", "unpaired", 300, 0),
        ("llamafactory_demo/glaive_toolcall_en_demo.json.gz", "sharegpt", 300, 0),
        ("llamafactory_demo/glaive_toolcall_zh_demo.json", "sharegpt", 300, 0),
        ("llamafactory_demo/v1_sft_demo.jsonl", "messages", 500, 0),
        ("llamafactory_demo/mllm_demo.json", "messages", 0, 6),  # images are refused, not dropped
        ("llamafactory_demo/c4_demo.jsonl.gz", "text", 300, 0),
        ("llamafactory_demo/wiki_demo.txt.gz", "text", 30, 0),
        ("hh_rlhf_harmless_test/test.jsonl.gz", "hh_dialogue", 2308, 4),  # four dialogues hold an empty turn
        ("instruct_rasbt/instruction-data.json", "alpaca", 1100, 0),
        ("instruct_rasbt/instruction-data-with-preference.json", "alpaca_preference", 1094, 6),  # six pairs of twins
        ("gsm8k/train.jsonl.gz", "question_answer", 7473, 0),
        ("self_instruct/seed_tasks.jsonl", "self_instruct", 175, 0),
        ("medquad/medquad_nih.jsonl.gz", "question_answer", 4607, 0),
    ],
)
def test_real_sets_need_no_conversion(shared_data: Path, file: str, shape: str, used: int, bad: int) -> None:
    examples, report = read(Source(source=str(shared_data / file)))
    assert (report.shape, len(examples), report.bad) == (shape, used, bad)
