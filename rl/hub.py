"""Names on the hub: `OWNER/NAME`, with `:CONFIG` or `:FILE` and `@SPLIT` where they are needed.

    hotpotqa/hotpot_qa:distractor@validation     a configuration and a split, through `datasets`
    Tongyi-Zhiwen/frames:test.jsonl              one file of the repository, read like a local one
    THUDM/LongBench:data.zip                     an archive of files

A file is fetched as it was published and goes through our own readers: values keep their types (a gold 5 stays 5, which
`datasets` would make 5.0 beside a 5.5), and data sets that come with a loading script, which `datasets` no longer runs,
are read from their files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers.utils.hub import cached_file

_NAME = re.compile(r"(?P<repository>\w[\w.-]*(?:/\w[\w.-]*)?)(?::(?P<part>[^:@]+))?(?:@(?P<split>[\w\[\]:%+-]+))?")
_FILES = (".jsonl", ".json", ".parquet", ".zip")


@dataclass(frozen=True)
class HubName:
    """repository: OWNER/NAME. config, file: at most one is given. split: None leaves it to the reader."""

    repository: str
    config: str | None = None
    file: str | None = None
    split: str | None = None


def hub_name(text: str) -> HubName | None:
    """The parts of a name; None if the text cannot be one."""
    match = _NAME.fullmatch(text)
    if match is None:
        return None
    part = match["part"]
    file = part if part is not None and part.endswith(_FILES) else None
    return HubName(match["repository"], None if file else part, file, match["split"])


def download(name: HubName, readable: Sequence[str]) -> Path:
    """The file of a repository, fetched into the hub's cache unless it is there.

    Raises ValueError for one that can't be had.
    """
    assert name.file is not None
    try:
        found = cached_file(name.repository, name.file, repo_type="dataset")
    except OSError as error:  # whatever the hub's client meets, down to a name that is no name
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"{name.repository}:{name.file}: cannot be fetched from the hub: {reason}. Without a connection, fetch it "
            f"elsewhere and give the local file or folder ({', '.join(readable)}, .zip) as the source"
        ) from error
    assert found is not None
    return Path(found)


def table_rows(name: HubName, split: str) -> Iterator[tuple[int, object]]:
    """(index, row) of a data set loaded through `datasets`."""
    import datasets  # slow to import, and needed for names alone

    arguments = (name.repository,) if name.config is None else (name.repository, name.config)
    try:
        table = datasets.load_dataset(*arguments, split=name.split or split)
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        raise ValueError(
            f"{name.repository}: no such file, and no data set of that name can be loaded: {error}"
        ) from error
    except RuntimeError as error:  # what `datasets` says of a repository with a loading script
        raise ValueError(
            f"{name.repository}: {error}. Name one of its files instead ({name.repository}:FILE), or a local copy"
        ) from error
    yield from enumerate(table)
