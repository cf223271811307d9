"""One evaluation from questions to tables: ask what isn't answered yet, score while others are still being asked, count.

Everything that ends is on disk before the next thing begins, so that a kill costs what was under way. Rules and judge work
while the model is asked; what a killed evaluation had is scored anew, which costs no request (verdicts are kept).
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ...engine import load_tokenizer
from .. import judge_prompt
from ..console import Console
from ..judge import Case, make_judge
from ..judge_base import Judge
from ..prompts import TEMPLATE
from .endpoint import Endpoint, Pending
from .local import LocalModel
from .questions import Question, Source, read_questions, tokenizer_sha256
from .report import write_reports
from .results import Response, ResultsFolder
from .scores import Scored, Scorer
from .settings import EvaluationConfig
from .summary import summarize

_PROBE = Case("What is the capital of France?", ("Paris",), "Paris")
"""Asked before anything else: a judge with a wrong key should not show after a night of generating."""


def run_evaluation(
    config: EvaluationConfig, root: Path, console: Console, environ: Mapping[str, str], *, rescore: bool = False
) -> dict[str, Any]:
    """What results.json holds, which is written with the reports.

    Raises:
        ValueError: wrong settings, data, folder or key. ServerDown: the server went away; the same command goes on.
    """
    folder = ResultsFolder(root)
    model = _model(config, folder, environ)
    tokenizer = model.tokenizer
    questions, sources = read_questions(config, tokenizer, console)
    model.check(questions)
    with closing(folder):
        folder.open(conditions(config, model, tokenizer, sources), rescore=rescore)
        judge = make_judge(config.judge, environ, root, console.warn) if config.judge else None
        if any(question.judged for question in questions):
            if judge is None:
                console.warn("no judge is given (--judge-url): the score is the rule's alone, which misses paraphrases")
            else:
                _probe(judge, console)
        begun = time.monotonic()
        scored = _ask(config, model, folder, questions, judge, console)
        results = {
            "made": _made(config, sources, time.monotonic() - begun, judge),
            "conditions": json.loads(folder.conditions_file.read_text(encoding="utf-8")),
            **summarize(scored, config),
            "questions": [one.dump() for one in scored],
        }
        folder.write(folder.results_file.name, json.dumps(results, ensure_ascii=True) + "\n")
        write_reports(folder.root, results)
    return results


def _model(config: EvaluationConfig, folder: ResultsFolder, environ: Mapping[str, str]) -> Endpoint | LocalModel:
    if not config.is_served:
        return LocalModel(config)
    name = config.server.api_key_env
    key = environ.get(name) if name else None
    if name and not key:
        raise ValueError(f"environment variable {name} (--api-key-env) is not set; export it")
    model = Endpoint(config, load_tokenizer(config.tokenizer), key)
    if folder.conditions_file.is_file():
        model.recall(json.loads(folder.conditions_file.read_text(encoding="utf-8")).get("model"))
    model.connect()
    return model


def conditions(
    config: EvaluationConfig,
    model: Endpoint | LocalModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[Source],
) -> dict[str, Any]:
    """All that the numbers hang on. `model` and `tokenizer` are what two compared evaluations may differ in."""
    judge = config.judge
    return {
        "model": model.identity(),
        "tokenizer": {"sha256": tokenizer_sha256(tokenizer)},
        "asked": {
            "benchmarks": {s.name: {"questions": s.questions, "fingerprint": s.fingerprint} for s in sources},
            "samples": config.samples, "max_input": config.max_input, "max_output": config.max_output,
            "truncation": "middle of the document, both ends kept", "template": TEMPLATE,
            "temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k, "seed": config.seed,
        },
        "scored": {
            "rule": config.scoring, "rules": list(config.rules), "buckets": list(config.buckets), "resamples": config.resamples,
            "judge": None if judge is None else {
                "model": judge.model or judge.model_dir, "prompt_version": judge_prompt.VERSION,
                "max_tokens": judge.max_tokens, "tail": judge.tail,
            },
        },
    }  # fmt: skip


def _probe(judge: Judge, console: Console) -> None:
    """Raises JudgeFailing where the judge refuses key, path or model."""
    [verdict] = asyncio.run(judge.verdicts([_PROBE]))
    if verdict != 1.0:
        said = "gives no verdict" if verdict is None else "says no"
        console.warn(
            f"the judge {said} on whether Paris is Paris: see whether it is any use before trusting its column"
        )


def _ask(
    config: EvaluationConfig, model: Endpoint | LocalModel, folder: ResultsFolder, questions: Sequence[Question],
    judge: Judge | None, console: Console,
) -> list[Scored]:  # fmt: skip
    kept = folder.responses()
    known = {
        (*question.key, sample): kept[(*question.key, sample)]
        for question in questions
        for sample in range(config.samples)
        if (*question.key, sample) in kept and not kept[(*question.key, sample)].again
    }
    wanted = [tuple(s for s in range(config.samples) if (*q.key, s) not in known) for q in questions]
    places = [place for place, samples in enumerate(wanted) if samples]
    pending = [Pending(questions[place], wanted[place]) for place in places]
    if known:
        console.say(f"{len(known)} responses are there already, {sum(map(len, wanted))} are asked for")
    with Scorer(config, judge, questions) as scorer:
        for response in known.values():
            scorer.add(response)
        with console.progress("asking", sum(map(len, wanted))) as advance:
            if pending:
                model.ask(pending, places, len(questions), _keeper(folder, scorer, advance))
        if judge is not None:
            console.say("waiting for the judge")
        return scorer.results()


def _keeper(folder: ResultsFolder, scorer: Scorer, advance: Callable[[], None]) -> Callable[[Response], None]:
    def keep(response: Response) -> None:
        folder.add(response)
        scorer.add(response)
        advance()

    return keep


def _made(config: EvaluationConfig, sources: Sequence[Source], seconds: float, judge: Judge | None) -> dict[str, Any]:
    """When, where and from what: told, never compared."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "longreach": metadata.version("longreach"),
        "torch": torch.__version__, "transformers": metadata.version("transformers"), "python": platform.python_version(),
        "hardware": {
            "generated_by": config.model if config.is_served else "this machine", "gpus": gpus,
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        },
        "tokenizer": config.tokenizer or config.model, "sources": {s.name: s.source for s in sources},
        "bad_rows": {s.name: s.bad_rows for s in sources if s.bad_rows}, "concurrency": config.server.concurrency,
        "seconds": round(seconds, 3), "judge": judge.metrics() if judge else None,
    }  # fmt: skip
