"""Paths and URIs: home, blanks, escapes, and what is no URI."""

from __future__ import annotations

from pathlib import Path

import pytest
from pyarrow import fs

from common.data.own_tokenizer import OwnTokenizer
from common.data.records import Prompt, read_prompts, write_jsonl
from common.errors import DataError
from common.files import resolve


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("file:///a b/x.jsonl", "/a b/x.jsonl"),
        ("file:///a%20b/x.jsonl", "/a b/x.jsonl"),
        ("file://localhost/a/x", "/a/x"),
        ("FILE:///a/x", "/a/x"),
        ("file:///exp #2/what?.jsonl", "/exp #2/what?.jsonl"),
        ("file:///100%/%C3%BC/ü", "/100%/ü/ü"),
        ("~/x.jsonl", "/home/me/x.jsonl"),
        ("/a/~/x", "/a/~/x"),
        ("~nobody-of-this-name/x", str(Path("~nobody-of-this-name/x").absolute())),
        ("data:v2/a.jsonl", str(Path("data:v2/a.jsonl").absolute())),
    ],
)
def test_where_a_local_path_leads(text: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    filesystem, inner = resolve(text)
    assert isinstance(filesystem, fs.LocalFileSystem)
    assert inner == path


@pytest.mark.parametrize("text", ["gs://bucket/a b/ü%20%.jsonl", "gs://bucket/a%20b/ü %.jsonl"])
def test_a_uri_of_a_store_may_hold_blanks(text: str) -> None:
    filesystem, inner = resolve(text)
    assert isinstance(filesystem, fs.GcsFileSystem)
    assert inner == "bucket/a b/ü %.jsonl"


@pytest.mark.parametrize(
    ("text", "says"), [("file://host/x", "host 'host'"), ("nope://a b", "not a URI")]
)
def test_what_is_no_uri(text: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        resolve(text)


def test_a_file_is_found_under_each_of_its_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "a b"
    folder.mkdir()
    write_jsonl(str(folder / "x.jsonl"), [Prompt(prompt="open:")])
    for name in ("~/a b/x.jsonl", f"file://{folder}/x.jsonl", f"file://{tmp_path}/a%20b/x.jsonl"):
        assert [p.prompt for p in read_prompts([name])] == ["open:"]


MARK = b"\xef\xbb\xbf"


def test_files_with_marks_that_were_joined(tmp_path: Path) -> None:
    path = tmp_path / "joined.jsonl"
    first, second = b'{"prompt": "a"}\n', '{"prompt": "\ufeffb"}\n'.encode()
    path.write_bytes(MARK + first + MARK + second + MARK + b"\n" + MARK)
    assert [p.prompt for p in read_prompts([str(path)])] == ["a", "\ufeffb"]


def test_a_mark_that_is_not_at_a_lines_start_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "joined.jsonl"
    path.write_bytes(b'{"prompt": "a"}' + MARK + b'{"prompt": "b"}\n')
    with pytest.raises(DataError, match=r"joined\.jsonl:1: torn JSON"):
        list(read_prompts([str(path)]))


def test_a_tokenizer_with_a_mark(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    OwnTokenizer.train(iter(["open the file"] * 3), 270).save(path)
    expected = OwnTokenizer.load(path).fingerprint()
    path.write_bytes(MARK + path.read_bytes())
    assert OwnTokenizer.load(f"file://{path}").fingerprint() == expected
