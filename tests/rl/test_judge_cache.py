"""Verdicts on disk survive kills, other writers and rotten bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from longreach.rl.judge_cache import VerdictCache, cache_key
from longreach.rl.judge_prompt import VERSION, Case, messages

WRITER = """
import sys, types
from pathlib import Path
light = sys.modules["light"] = types.ModuleType("light")  # the same file without the package's torch: it starts at once
light.__path__ = [sys.argv[4]]
from light.judge_cache import VerdictCache
cache = VerdictCache(Path(sys.argv[1]), print)
for i in range(int(sys.argv[3])):
    cache.put(f"{sys.argv[2]}-{i}", float(i % 2))
"""


def command(script: str, path: Path, name: str, count: int, root: Path) -> list[str]:
    return [sys.executable, "-c", script, str(path), name, str(count), str(root / "rl")]


def opened(path: Path) -> tuple[VerdictCache, list[str]]:
    said: list[str] = []
    return VerdictCache(path, said.append), said


def test_what_is_put_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "v.jsonl"
    one, said = opened(path)
    one.put("a", 1.0)
    one.put("b", 0.0)
    again, _ = opened(path)
    assert [again.get(key) for key in "abc"] == [1.0, 0.0, None]
    assert said == []


def test_without_a_file_it_lives_in_memory() -> None:
    one = VerdictCache(None, print)
    one.put("a", 1.0)
    one.refresh()
    assert one.get("a") == 1.0


@pytest.mark.parametrize("cut", [1, 2, 10, 40])
def test_a_torn_line_is_told_of_and_the_next_one_starts_afresh(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "v.jsonl"
    one, _ = opened(path)
    one.put("é" * 20, 1.0)
    one.put("b" * 20, 0.0)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    torn, said = opened(path)
    assert torn.get("é" * 20) == 1.0
    assert (torn.get("b" * 20) == 0.0) == (cut == 1), "of the last byte only the line's end is lost"
    assert (len(said) == 1) == (cut > 1)
    torn.put("c", 1.0)
    again, _ = opened(path)
    assert [again.get("é" * 20), again.get("c")] == [1.0, 1.0]


@pytest.mark.parametrize(
    "rot",
    [
        b"\x00\xff\xfe garbage \x80\n",
        b"[1, 2]\n",
        b"null\n",
        b'{"key": "a", "verdict": 1.0}\n',
        b'{"key": "a", "verdict": 0.5, "check": "00000000"}\n',
        b'{"key": ["a"], "verdict": 1.0, "check": "00000000"}\n',
        b'{"key": "a", "verdict": true, "check": "00000000"}\n',
        b"[" * 100_000 + b"\n",
    ],
)
def test_rotten_lines_are_left_out_with_a_warning(tmp_path: Path, rot: bytes) -> None:
    path = tmp_path / "v.jsonl"
    one, _ = opened(path)
    one.put("kept", 0.0)
    path.write_bytes(rot + path.read_bytes() + rot)
    again, said = opened(path)
    assert (again.get("kept"), again.get("a")) == (0.0, None)
    assert len(said) == 1 and "2 unreadable line(s)" in said[0]


def test_a_flipped_verdict_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    opened(path)[0].put("a", 0.0)
    line = json.loads(path.read_text())
    path.write_text(json.dumps({**line, "verdict": 1.0}) + "\n")
    assert opened(path)[0].get("a") is None


def test_processes_write_at_once_and_see_each_other(tmp_path: Path, root: Path) -> None:
    path = tmp_path / "v.jsonl"
    here, said = opened(path)
    others = [subprocess.Popen(command(WRITER, path, name, 300, root)) for name in ("x", "y")]
    for i in range(300):
        here.put(f"z-{i}", float(i % 2))
    assert [other.wait(60) for other in others] == [0, 0]
    here.refresh()
    found = [here.get(f"{name}-{i}") for name in "xyz" for i in range(300)]
    assert found == [float(i % 2) for _ in "xyz" for i in range(300)]
    assert said == []
    assert len(path.read_text().splitlines()) == 900


def test_a_killed_writer_loses_no_verdict_it_reported(tmp_path: Path, root: Path) -> None:
    path = tmp_path / "v.jsonl"
    script = WRITER.replace("float(i % 2))", "float(i % 2)); print(i, flush=True)")
    writer = subprocess.Popen(command(script, path, "x", 1000000, root), stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    seen = [writer.stdout.readline() for _ in range(200)]
    writer.kill()
    seen += writer.stdout.readlines()
    writer.wait()
    found, _ = opened(path)
    assert all(found.get(f"x-{int(i)}") is not None for i in seen if i.endswith("\n"))


def test_a_full_disk_is_told_once_and_the_verdicts_stay(tmp_path: Path) -> None:
    one, said = opened(tmp_path / "v.jsonl")
    one.path = Path("/dev/full")
    one.put("a", 1.0)
    one.put("b", 0.0)
    assert [one.get("a"), one.get("b")] == [1.0, 0.0]
    assert len(said) == 1 and "kept in memory" in said[0]


def test_a_file_that_shrank_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    one, _ = opened(path)
    one.put("a" * 100, 1.0)
    one.refresh()
    path.unlink()
    opened(path)[0].put("b", 1.0)
    one.refresh()
    assert one.get("b") == 1.0


def test_the_key_tells_everything_apart_that_a_verdict_hangs_on() -> None:
    def key(
        model: str = "m", question: str = "q", answers: tuple[str, ...] = ("a",), prediction: str = "p",
        version: int = VERSION,
    ) -> str:  # fmt: skip
        return cache_key(version, model, messages(Case(question, answers, prediction)))

    different = [
        key(),
        key(model="n"),
        key(question="r"),
        key(answers=("b",)),
        key(answers=("a", "b")),
        key(prediction="r"),
        key(version=99),
    ]
    assert len(set(different)) == len(different)
    assert key() == key()


def test_a_cache_of_other_values_takes_what_it_is_told_to(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"

    def lists(path: Path) -> VerdictCache[list[str]]:
        return VerdictCache(path, print, lambda value: isinstance(value, list))

    lists(path).put("a", ["é", "b"])
    opened(path)[0].put("plain", 1.0)
    assert lists(path).get("a") == ["é", "b"]
    assert lists(path).get("plain") is None
