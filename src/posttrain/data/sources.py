"""Reading rows: files, hub data sets and task generators become Examples, and bad rows a report.

Lines are read one at a time with a bound on their size; nothing a file holds makes reading crash.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from posttrain.data import shapes, tasks
from posttrain.data.shapes import BadRow, Detection, Malformed
from posttrain.recipe.blocks import Source
from posttrain.records import Example, UserError

MAX_LINE = 16 * 2**20
"""Longest line, in bytes; a longer one is a bad row and is skipped without being held in memory."""
PROBE = 64
"""Rows that detection looks at."""
LISTED = 20
"""Bad rows that a report lists; the others are counted."""


@dataclass(frozen=True, slots=True)
class SourceReport:
    source: str
    shape: str
    reason: str
    """Why this shape."""
    rows: int
    """Rows read, bad ones included."""
    bad: int
    bad_rows: tuple[BadRow, ...]
    """The first of them."""


class Loaded(NamedTuple):
    examples: list[Example]
    report: SourceReport


class Raw(NamedTuple):
    """A row before its shape is known: a value, or a reason why there is none."""

    where: str
    value: Any = None
    why: str = ""


def read(source: Source) -> Loaded:
    """All rows of `source`, or its first `source.rows`.

    Raises UserError where the source as a whole cannot be read: missing, empty, of an unknown kind, no known
    shape. A row that cannot be read is counted and listed in the report.
    """
    name = source.source
    if source.shape is not None and source.shape not in shapes.SHAPES:
        known = ", ".join(shapes.SHAPES)
        raise UserError(
            f"{name}: no shape {source.shape!r}{tasks.did_you_mean(source.shape, shapes.SHAPES)} (known: {known})"
        )
    if name.startswith(tasks.PREFIX):
        assert source.rows is not None  # the schema asks it of a generator
        made = tasks.load(name.removeprefix(tasks.PREFIX), source.rows, source.seed, source.config)
        return Loaded(made, SourceReport(name, "task", "made by a generator", len(made), 0, ()))
    if name.startswith("hub:"):
        return _shaped(itertools.islice(_hub(source), source.rows), source, Path(name).name)
    path = Path(name)
    return _shaped(itertools.islice(_file(path), source.rows), source, path.name)


def _shaped(raw: Iterator[Raw], source: Source, label: str) -> Loaded:
    probe = list(itertools.islice(raw, PROBE))
    if not probe:
        raise UserError(f"{source.source}: empty, there is no row in it; name a file that has some")
    values = [row.value for row in probe if not row.why]
    if source.shape is not None:
        found: Detection | None = Detection(source.shape, "set in the recipe")
    else:
        found = shapes.detect(values)
    if found is None:
        columns = next((", ".join(map(str, v)) for v in values if isinstance(v, dict)), None)
        if columns is None:
            raise UserError(f"{source.source}: no known row shape; first problem: {_first_problem(probe)}")
        known = "; ".join(f"{name} ({shape.columns})" for name, shape in shapes.SHAPES.items())
        raise UserError(
            f"{source.source}: no known row shape; the first row has the columns {columns}. Rename them to those of "
            f"a known shape: {known}"
        )
    examples: list[Example] = []
    listed: list[BadRow] = []
    bad = rows = 0
    for row in itertools.chain(probe, raw):
        rows += 1
        try:
            if row.why:
                raise Malformed(row.why)
            examples.append(shapes.convert(row.value, found.name, f"{label}{row.where}"))
        except Malformed as error:
            bad += 1
            if len(listed) < LISTED:
                listed.append(BadRow(f"{label}{row.where}", str(error)))
    return Loaded(examples, SourceReport(source.source, found.name, found.reason, rows, bad, tuple(listed)))


def _first_problem(probe: list[Raw]) -> str:
    return next((f"{r.where.lstrip(':')}: {r.why}" for r in probe if r.why), "rows are not objects")


# Files


def _file(path: Path) -> Iterator[Raw]:
    if path.is_dir():
        raise UserError(f"{path}: a folder, not a file{_near(path)}")
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    reader = READERS.get(suffix)
    if reader is None:
        raise UserError(f"{path}: unknown kind of file {suffix!r} (known: {', '.join(READERS)}, each also .gz)")
    if not path.is_file():
        raise UserError(f"{path}: no such file{_near(path)}")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            yield from reader(stream, path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: broken gzip file ({error}); fetch it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _near(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir():
        return f"; there is no folder {folder} either"
    files = [entry.name for entry in folder.iterdir() if entry.is_file()]
    near = files[:5] if path.is_dir() else difflib.get_close_matches(path.name, files, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(sorted(near))}?" if near else ""


def _lines(stream: BinaryIO) -> Iterator[tuple[int, str, str]]:
    """(number, text, problem) of every line; split at newlines only, never at other Unicode separators."""
    for number in itertools.count(1):
        line = stream.readline(MAX_LINE + 1)
        if not line:
            return
        if len(line) > MAX_LINE:
            while line and not line.endswith(b"\n"):
                line = stream.readline(MAX_LINE)
            yield number, "", f"longer than {MAX_LINE // 2**20} MiB"
            continue
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8"), ""
        except UnicodeDecodeError as error:
            yield number, "", f"not valid UTF-8 at byte {error.start}; save the file as UTF-8"


def _constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_constant)


def _parsed(text: str, where: str) -> Raw:
    try:
        return Raw(where, _DECODER.decode(text))
    except RecursionError:
        return Raw(where, why="nested too deeply")
    except ValueError as error:
        return Raw(where, why=f"not valid JSON ({error})")


def _jsonl(stream: BinaryIO, path: Path) -> Iterator[Raw]:
    for number, text, problem in _lines(stream):
        if problem:
            yield Raw(f":{number}", why=problem)
        elif text.strip():
            yield _parsed(text, f":{number}")


_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)
_BETWEEN = re.compile(r"[\s,]*")


def _json(stream: BinaryIO, path: Path) -> Iterator[Raw]:
    """A JSON array, element by element: one that cannot be parsed is a bad row, and the next is read."""
    # A byte that is not UTF-8 becomes a lone surrogate, which the shapes refuse in the row where it stands.
    text = stream.read().decode("utf-8-sig", errors="surrogateescape")
    at = _BETWEEN.match(text).end()  # type: ignore[union-attr]
    if at == len(text):
        return
    if text[at] == "{":  # JSON lines under another name
        yield from _jsonl(io.BytesIO(text.encode(errors="surrogateescape")), path)
        return
    if text[at] != "[":
        if "\udc80" <= text[at] <= "\udcff":
            raise UserError(f"{path}: not UTF-8 (its first byte is 0x{ord(text[at]) - 0xDC00:02x}); save it as UTF-8")
        raise UserError(f"{path}: the top level must be a list of rows")
    at, line, counted = at + 1, 1, 0
    while True:
        at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, at), at
        if text.startswith("]", at):
            return
        try:
            value, at = _DECODER.raw_decode(text, at)
            yield Raw(f":{line}", value)
        except (ValueError, RecursionError) as error:
            at = _after(text, at, f"{path}:{line}")
            why = "nested too deeply" if isinstance(error, RecursionError) else f"not valid JSON ({error})"
            yield Raw(f":{line}", why=why)


def _after(text: str, at: int, where: str) -> int:
    """End of the element at `at`, found by its brackets alone."""
    depth = 0
    for match in _BRACKETS.finditer(text, at):
        if match[0] in "[{":
            depth += 1
        elif match[0] in "]}":
            if depth == 0:
                return match.start()  # the end of the list: a broken element without brackets was its last
            depth -= 1
            if depth == 0:
                return match.end()
    raise UserError(f"{where}: not valid JSON: what begins here never ends; mend the file")


def _table(delimiter: str) -> Any:
    def rows(stream: BinaryIO, path: Path) -> Iterator[Raw]:
        problems: list[Raw] = []

        def lines() -> Iterator[str]:
            for number, text, problem in _lines(stream):
                if problem or "\0" in text:
                    problems.append(Raw(f":{number}", why=problem or "holds a NUL character"))
                else:
                    taken.append(number)
                    yield text

        taken: list[int] = []
        csv.field_size_limit(MAX_LINE)
        reader = csv.reader(lines(), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            taken.clear()
            try:
                cells = next(reader)
            except StopIteration:
                yield from problems
                return
            except csv.Error as error:
                first = taken[0] if taken else 1
                if "end of data" in str(error):
                    why = "a quoted cell that begins here never ends; mend the file"
                    raise UserError(f"{path}:{first}: {why}") from None
                cells, why = [], f"not valid CSV ({error})"
            else:
                why = ""
            yield from problems
            problems.clear()
            where = f":{taken[0] if taken else 1}"
            if why:
                yield Raw(where, why=why)
            elif not cells:
                continue
            elif header is None:
                header = cells
                if len(set(header)) < len(header):
                    raise UserError(f"{path}{where}: the header names a column twice")
            elif len(cells) != len(header):
                yield Raw(where, why=f"{len(cells)} cells, the header has {len(header)}")
            else:
                yield Raw(where, dict(zip(header, cells, strict=True)))

    return rows


def _parquet(stream: BinaryIO, path: Path) -> Iterator[Raw]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(stream.read()) if path.suffix == ".gz" else path)
        index = itertools.count()
        for batch in file.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                yield Raw(f"[{next(index)}]", row)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({error})") from None


def _txt(stream: BinaryIO, path: Path) -> Iterator[Raw]:
    """One document a line, as `datasets` reads text."""
    for number, text, problem in _lines(stream):
        if problem or text.strip():
            yield Raw(f":{number}", {"text": text.rstrip("\r\n")}, problem)


READERS = {
    ".jsonl": _jsonl, ".json": _json, ".csv": _table(","), ".tsv": _table("\t"), ".parquet": _parquet, ".txt": _txt,
}  # fmt: skip


# The hub


def _hub(source: Source) -> Iterator[Raw]:
    """Rows of a hub data set, streamed. `config` may hold its configuration's `name` and a `revision`."""
    import datasets

    if unknown := sorted(set(source.config) - {"name", "revision"}):
        raise UserError(f"{source.source}: config has no key {unknown[0]!r}; a hub data set takes name and revision")
    try:
        rows = datasets.load_dataset(
            source.source.removeprefix("hub:"), split=source.split, streaming=True, **source.config
        )
        for index, row in enumerate(rows):
            yield Raw(f"[{index}]", dict(row))
    except Exception as error:  # network, authentication, missing configuration or split: many unrelated types
        first = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{source.source}: cannot be loaded from the hub ({type(error).__name__}: {first}). Check its name, "
            "`split`, `config.name` and the network, or give a downloaded file instead."
        ) from None
