"""Prompts in files."""

import json

import pytest

from duoserve.cli.prompts import read_prompts
from duoserve.errors import RequestError


def test_json_lines_are_texts_or_objects(tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps("a\nb") + "\n\n" + json.dumps({"prompt": "c", "id": 1}) + "\n")
    assert read_prompts(tmp_path / "p.jsonl") == ["a\nb", "c"]
    for line, fault in [
        ("[1]", "must be a text"),
        ("{", "is not JSON"),
        ("[" * 1_000_000, "is not JSON"),
        ('{"prompt": 3}', "must be a text"),
    ]:
        (tmp_path / "q.jsonl").write_text(f'"fine"\n\n{line}\n')
        with pytest.raises(RequestError, match=f"line 3: {fault}"):
            read_prompts(tmp_path / "q.jsonl")


def test_only_a_line_feed_ends_a_prompt(tmp_path):
    """Not what Unicode calls a line's end besides; and a mark of the byte order, as Windows sets it, is no text."""
    texts = ["one\u2028line\x0bof\x85many\x0cends\rhere", "another"]
    (tmp_path / "p.txt").write_bytes("\r\n".join(["\ufeff" + texts[0], "", texts[1], ""]).encode())
    assert read_prompts(tmp_path / "p.txt") == texts
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(text, ensure_ascii=False) for text in texts), "utf-8-sig")
    assert read_prompts(tmp_path / "p.jsonl") == texts
