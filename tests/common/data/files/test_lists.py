"""Files, folders and patterns; packed files and arrays read as the plain lines are."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from common.data.files import lists
from common.data.files.lists import files_at
from common.data.files.rows import source_of
from common.data.records import Prompt, read_comparisons, read_prompts
from common.errors import DataError

LINES = b'{"prompt": "a"}\n\n{"prompt": "b"}\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("data/b.jsonl", "data/a.jsonl", "data/in/c.jsonl", "data/.hidden.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(LINES)
    (tmp_path / "data" / "README.md").write_text("no data")
    (tmp_path / "odd[1]*.jsonl").write_bytes(LINES)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "files"),
    [
        ("data/a.jsonl", ["data/a.jsonl"]),
        ("data", ["data/a.jsonl", "data/b.jsonl"]),
        ("data/", ["data/a.jsonl", "data/b.jsonl"]),
        ("data/*.jsonl", ["data/a.jsonl", "data/b.jsonl"]),
        ("data/**/*.jsonl", ["data/a.jsonl", "data/b.jsonl", "data/in/c.jsonl"]),
        ("**/[bc].jsonl", ["data/b.jsonl", "data/in/c.jsonl"]),
        ("d?ta/*/c.jsonl", ["data/in/c.jsonl"]),
        ("data/.*.jsonl", ["data/.hidden.jsonl"]),
        ("odd[1]*.jsonl", ["odd[1]*.jsonl"]),  # a file of that very name
    ],
)
def test_what_a_path_means(folder: Path, path: str, files: list[str]) -> None:
    assert files_at([path]) == files
    # From the root the same files in the same order, by another way to them.
    assert files_at([f"{folder}/{path}"]) == [f"{folder}/{file}" for file in files]
    if "?" not in path:  # which begins the options of a URI
        assert files_at([f"file://{folder}/{path}"]) == [f"file://{folder}/{f}" for f in files]


def test_files_and_patterns_in_one_list_keep_their_order(folder: Path) -> None:
    assert files_at(["data/b.jsonl", "data/in"]) == ["data/b.jsonl", "data/in/c.jsonl"]
    assert files_at(["data/b.jsonl"] * 2) == ["data/b.jsonl"] * 2


@pytest.mark.parametrize(
    ("paths", "says"),
    [
        (["data/*.parquet"], "data/*.parquet: no file fits this pattern; check it"),
        (["nowhere/*.jsonl"], "nowhere/*.jsonl: no file fits this pattern; check it"),
        (["nowhere"], "nowhere: no such file; check the path"),
        (["."], ".: is a folder without a data file of its own"),
        (
            ["data/a.jsonl", "data/*.jsonl"],
            "data/a.jsonl: is meant twice, by data/a.jsonl and data/*.jsonl; name it once",
        ),
        (["data", "data/*"], "is meant twice, by data and data/*"),
    ],
)
def test_what_means_nothing_is_refused(folder: Path, paths: list[str], says: str) -> None:
    (folder / "odd[1]*.jsonl").unlink()
    with pytest.raises(DataError) as error:
        files_at(paths)
    assert says in str(error.value)


def test_a_pattern_on_a_remote_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Arrow's own stand-in for one; a URI keeps its options."""
    remote = fs._MockFileSystem()
    remote.create_dir("bucket/data")
    for name in ("two words.jsonl", "a.jsonl", "b.txt"):
        with remote.open_output_stream(f"bucket/data/{name}") as stream:
            stream.write(LINES)
    inner = lambda path: path.removeprefix("s3://").partition("?")[0].rstrip("/")  # noqa: E731
    monkeypatch.setattr(lists, "resolve", lambda path: (remote, inner(path)))
    found = ["s3://bucket/data/a.jsonl", "s3://bucket/data/two%20words.jsonl"]
    assert files_at(["s3://bucket/data"]) == found
    options = "?region=eu"
    expected = [f"{file}{options}" for file in found]
    assert files_at([f"s3://bucket/data/*.jsonl{options}"]) == expected


# ------------------------------------------------------------------ packed files and arrays


def write(path: Path, raw: bytes) -> Path:
    """Write bytes as the file's name says that they are packed."""
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(raw))
    elif path.suffix == ".zst":
        with pa.output_stream(str(path), compression="zstd") as stream:
            stream.write(raw)
    else:
        path.write_bytes(raw)
    return path


PLACES = {"lines": (1, 3), "array": ("element 1", "element 2")}


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("name", "raw", "kind"),
    [
        ("a.jsonl", LINES, "lines"),
        ("a.ndjson", LINES, "lines"),
        ("a.json", LINES, "lines"),
        ("a.json", b'\xef\xbb\xbf [{"prompt": "a"},\n {"prompt": "b"}]\n', "array"),
        ("a.json", b" " * 100_000 + b'\n[{"prompt": "a"},{"prompt": "b"}]', "array"),
    ],
)
def test_the_same_prompts_from_every_form(
    tmp_path: Path, name: str, raw: bytes, kind: str, ending: str
) -> None:
    path = write(tmp_path / f"{name}{ending}", raw)
    prompts = list(read_prompts([str(path)]))
    assert prompts == [Prompt(prompt="a"), Prompt(prompt="b")]
    assert [p.place for p in prompts] == [f"{path}:{place}" for place in PLACES[kind]]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_parts_that_were_packed_one_by_one_are_read_to_their_end(
    tmp_path: Path, ending: str
) -> None:
    """As `cat a.gz b.gz` and parallel packers leave them; gzip and zstd tools unpack all of it."""
    parts = [write(tmp_path / f"{n}.jsonl{ending}", b'{"prompt": "%d"}\n' % n) for n in range(3)]
    whole = tmp_path / f"whole.jsonl{ending}"
    whole.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert [p.prompt for p in read_prompts([str(whole)])] == ["0", "1", "2"]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_torn_packed_file_is_refused(tmp_path: Path, ending: str) -> None:
    path = write(
        tmp_path / f"a.jsonl{ending}", b'{"prompt": "%s"}\n' % os.urandom(50_000).hex().encode()
    )
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"a\.jsonl\.\w+(:1)?: (cannot be read|torn JSON)"):
        list(read_prompts([str(path)]))


def test_a_packed_file_under_another_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(LINES)
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: cannot be read"):
        list(read_prompts([str(path)]))


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b'[{"prompt": "a"},\n {"prompt": }]', ":2: torn JSON (Expecting value, column 13)"),
        (b'[{"prompt": "a"}', ":1: torn JSON (Expecting ',' delimiter, column 17)"),
        (b"[]", ": holds no records; write at least one object"),
        (b" \n ", ": holds no records"),
        (b'["a"]', ':element 1: is of type str; write an object such as {"prompt": "..."}'),
        (b'[{"prompt": "a"}, {"prompt": ""}]', ":element 2: field 'prompt': "),
        (b'[{"prompt": "\xff"}]', ":1: is not UTF-8; save it as UTF-8"),
        (b"[" * 100_000, ": torn JSON"),
    ],
)
def test_what_is_wrong_with_an_array_is_named(tmp_path: Path, raw: bytes, says: str) -> None:
    path = write(tmp_path / "a.json", raw)
    with pytest.raises(DataError) as error:
        list(read_prompts([str(path)]))
    assert str(error.value).startswith(f"{path}{says}")


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.parquet.gz", "a.jsonl.bz2", "a"])
def test_other_kinds_of_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(LINES)
    with pytest.raises(DataError, match=r"extension '.*' is unknown; use \.jsonl or \.json"):
        source_of(str(tmp_path / name))


# ------------------------------------------------------------------ bad rows


def test_all_bad_rows_are_named_at_once(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b" if n % 2 else "a"} for n in range(6)]
    path = write(tmp_path / "a.jsonl", b"\n".join(json.dumps(row).encode() for row in rows))
    table = tmp_path / "b.parquet"
    pq.write_table(pa.table({"prompt": ["p"], "chosen": ["x"], "rejected": ["x"]}), table)
    with pytest.raises(DataError) as error:
        list(read_comparisons([str(path), str(table)]))
    assert str(error.value) == (
        f"{path}:1: field 'rejected': equal to 'chosen'; a comparison needs two different "
        f"responses, so take the line out; also refused: {path}:3, {path}:5, {table}:row 1"
    )
    told: list[str] = []
    kept = list(read_comparisons([str(path), str(table)], lambda bad: told.append(str(bad))))
    assert len(kept) == 3
    assert len(told) == 4


def test_reading_stops_at_the_twentieth_bad_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"prompt": 1}\n' * 20 + b'{"prompt": "good"}\n' * 3)
    with pytest.raises(DataError) as twenty:
        list(read_prompts([str(path)]))
    assert str(twenty.value).endswith(f"{path}:19, {path}:20")
    write(path, b'{"prompt": 1}\n' * 21)
    with pytest.raises(DataError) as more:
        list(read_prompts([str(path)]))
    assert str(more.value).endswith(f"{path}:19, {path}:20 and more")
