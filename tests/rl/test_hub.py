"""Names on the hub: their parts, the files they fetch, and what is said when they can't be had."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import datasets
import pytest

from longreach.rl import hub
from longreach.rl.data import read_examples
from longreach.rl.hub import HubName, hub_name

GOOD = {"context": "c", "question": "q", "answers": ["x"]}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("squad", HubName("squad")),
        ("owner/name", HubName("owner/name")),
        ("owner/name@validation", HubName("owner/name", split="validation")),
        ("owner/name:distractor@train[:10%]", HubName("owner/name", config="distractor", split="train[:10%]")),
        ("owner/name:test.jsonl", HubName("owner/name", file="test.jsonl")),
        ("owner/na-me_2.0:folder/data.zip", HubName("owner/na-me_2.0", file="folder/data.zip")),
        ("/owner/name", None),
        ("./owner:x", None),
        ("a/b/c", None),
        ("hotpot*.jsonl", None),
    ],
)
def test_the_parts_of_a_name(text: str, expected: HubName | None) -> None:
    assert hub_name(text) == expected


def test_a_configuration_and_a_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*arguments: str, split: str) -> datasets.Dataset:
        asked.append((*arguments, split))
        return datasets.Dataset.from_list([GOOD])

    monkeypatch.setattr(datasets, "load_dataset", load)
    (example,) = read_examples("owner/cities:large@validation").examples
    assert (example.id, example.benchmark) == ("cities-0", "cities")
    read_examples("owner/cities:large", split="test")
    assert asked == [("owner/cities", "large", "validation"), ("owner/cities", "large", "test")]


def test_a_loading_script_is_no_longer_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: str, split: str) -> datasets.Dataset:
        raise RuntimeError("Dataset scripts are no longer supported, but found LongBench.py")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        ValueError, match=r"found LongBench\.py\. Name one of its files instead \(THUDM/LongBench:FILE\)"
    ):
        read_examples("THUDM/LongBench:hotpotqa")


def test_a_file_is_fetched_and_read_like_a_local_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as written:
        written.writestr("data/cities.jsonl", json.dumps(GOOD) + "\n")
    asked: list[Any] = []

    def fetch(repository: str, file: str, *, repo_type: str) -> str:
        asked.append((repository, file, repo_type))
        if file != "data.zip":
            raise OSError("no connection")
        return str(archive)

    monkeypatch.setattr(hub, "cached_file", fetch)
    result = read_examples("owner/name:data.zip")
    assert asked == [("owner/name", "data.zip", "dataset")]
    assert [example.id for example in result.examples] == ["cities-0"]
    assert result.files == [f"{archive}/data/cities.jsonl"]
    with pytest.raises(
        ValueError, match=r"owner/name:test\.jsonl: cannot be fetched .*no connection.*give the local file"
    ):
        read_examples("owner/name:test.jsonl")


def test_a_local_file_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("part@1.jsonl").write_text(json.dumps(GOOD) + "\n")
    assert len(read_examples("part@1.jsonl").examples) == 1
