"""One step of training on given GPUs: does it fit, how long does it take, and what bounds it.

A step generates G completions of each prompt, takes log-probs where they are needed, and updates over packed rows, which
data-parallel ranks share out. Lengths are the largest that a phase allows: what fits then fits always, and its time and
cost are upper bounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .planner_hardware import Gpu
from .planner_memory import Memory, Setting, forward_memory, generation_memory, training_memory
from .planner_serving import beside_training, server_memory, server_problems, serving_time, weights_time
from .planner_shape import ModelShape, Row
from .planner_time import (
    Time,
    decode_time,
    forward_time,
    prefill_time,
    sync_time,
    update_time,
    update_work,
)

CLAIMED = ", which a server claims for itself: bound it by generator.cache_gib, or give it GPUs of its own (generator.devices)"


@dataclass(frozen=True)
class Load:
    """What one step does, over all ranks."""

    name: str
    steps: int
    row: Row
    """The row of one micro-batch at its largest."""
    rows: int
    """Rows of a step's updates; each ends in the group's G completions, or in some of them with its prompt again."""
    forward_rows: int = 0
    """Rows that pass without gradients: old log-probs of all updates but the first, and the reference's."""
    prompts: int = 0
    """Generated from; 0: nothing is."""
    size: int = 1
    prompt: int = 0
    completion: int = 0
    batch_tokens: int = 0
    """The generator's budget of cached tokens."""
    passes: int = 6
    """Products of N x D x V that the loss takes of a row: 6 in one pass over the vocabulary, 8 in two."""

    @property
    def tokens(self) -> int:
        """Tokens trained on in a step: prompts once for each completion, as throughput counts them."""
        if not self.prompts:
            return self.rows * self.row.tokens
        return self.prompts * self.size * (self.prompt + self.completion)


@dataclass(frozen=True)
class StepPlan:
    """Memory and time of one rank in one step."""

    load: Load
    setting: Setting
    gpu: Gpu
    memory: Mapping[str, Memory]
    """By what runs: update, log-probs, generation or a server."""
    times: Mapping[str, Time]
    flops: float
    dense_flops: float
    """Of the same step with each completion's prompt computed anew."""
    problems: tuple[str, ...] = field(default=())

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def peak(self) -> tuple[str, Memory]:
        """What needs most, and how much."""
        name = max(self.memory, key=lambda what: self.memory[what].total)
        return name, self.memory[name]

    @property
    def training(self) -> float:
        """Seconds of the trainer's own work."""
        return sum(time.total for what, time in self.times.items() if what not in ("generation", "weight sync"))

    @property
    def generation(self) -> float:
        return self.times["generation"].total if "generation" in self.times else 0.0

    @property
    def overlaps(self) -> bool:
        """Whether the next step is generated while this one trains."""
        return self.setting.servers is not None and self.setting.servers.overlaps and "generation" in self.times

    @property
    def seconds(self) -> float:
        """One part after the other, or the longer of generation and training; new weights wait for both."""
        both = max(self.training, self.generation) if self.overlaps else self.training + self.generation
        return both + (self.times["weight sync"].total if "weight sync" in self.times else 0.0)

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs."""
        return self.load.tokens / self.seconds

    @property
    def utilisation(self) -> float:
        """Model FLOPs that the update does, over what the GPUs could do meanwhile."""
        update = self.times["update"].total
        return self.flops / (update * self.setting.gpus * self.gpu.flops) if update else 0.0


def plan_step(shape: ModelShape, setting: Setting, gpu: Gpu, load: Load) -> StepPlan:
    """The plan of one step; what doesn't fit stands in its `problems`."""
    memory = {"update": training_memory(shape, setting, load.row)}
    times: dict[str, Time] = {}
    if load.prompts and setting.servers is not None:
        times["generation"] = serving_time(shape, setting.servers, gpu, load)
        times["weight sync"] = weights_time(shape, setting, setting.servers, gpu)
    elif load.prompts:
        groups = _groups_at_once(load, setting)
        cached = groups * (load.prompt + load.size * load.completion)
        memory["generation"] = generation_memory(shape, setting, cached, load.prompt)
        times["generation"] = _generation(shape, setting, gpu, load, groups)
        times["weight sync"] = sync_time(shape, setting, gpu)
    if load.forward_rows:
        memory["log-probs"] = forward_memory(shape, setting, load.row)
        times["log-probs"] = _times(forward_time(shape, setting, gpu, load.row), _turns(load.forward_rows, setting))
    times["update"] = _times(update_time(shape, setting, gpu, load.row, load.passes), _turns(load.rows, setting))
    if load.prompts and setting.servers is not None:
        memory = {what: beside_training(shape, setting.servers, gpu, one, load) for what, one in memory.items()}
        memory["server"] = server_memory(shape, setting, setting.servers, gpu, load)
    problems = _problems(shape, setting, gpu, load, memory)
    plain = Setting(dtype=setting.dtype, autocast=setting.autocast, lora=setting.lora)
    flops = load.rows * update_work(shape, plain, load.row, load.passes).flops
    return StepPlan(
        load,
        setting,
        gpu,
        memory,
        times,
        flops,
        _dense_flops(shape, plain, load),
        problems,
    )


def _problems(
    shape: ModelShape, setting: Setting, gpu: Gpu, load: Load, memory: Mapping[str, Memory]
) -> tuple[str, ...]:
    found = []
    if setting.servers is not None and load.prompts:
        found += server_problems(shape, setting, setting.servers, gpu, load)
    if setting.serve and setting.gpus % setting.serve:
        found.append(f"{setting.gpus} GPUs can't be shared out over generators of {setting.serve}")
    if setting.gpus % setting.sp:
        found.append(f"{setting.gpus} GPUs can't be shared out over ring x ulysses = {setting.sp}")
    if shape.heads % setting.ulysses:
        found.append(f"ulysses = {setting.ulysses} doesn't divide the {shape.heads} query heads")
    for what, need in memory.items():
        if need.total > gpu.usable:
            part = max(need.parts, key=lambda name: need.parts[name])
            claimed = setting.servers is not None and not setting.servers.cache and part == "generator keys and values"
            found.append(
                f"{what} needs {need.total / 1e9:.1f} GB of {gpu.usable / 1e9:.1f} ({need.moment}; most of it {part}: "
                f"{need.parts[part] / 1e9:.1f}{CLAIMED if claimed else ''})"
            )
        if need.host > gpu.host_memory:
            found.append(
                f"{what} needs {need.host / 1e9:.0f} GB of host memory for each GPU, of {gpu.host_memory / 1e9:.0f}"
            )
    return tuple(found)


def _times(one: Time, turns: int) -> Time:
    return Time(one.seconds * turns, one.bound, one.communication * turns)


def _turns(rows: int, setting: Setting) -> int:
    return -(-rows // setting.data)


def _groups_at_once(load: Load, setting: Setting) -> int:
    """Prompts that one generator decodes together: within its budget, and its share of the step's prompts."""
    fitting = max(1, load.batch_tokens // (load.prompt + load.size * load.completion))
    return min(fitting, _share(load, setting))


def _share(load: Load, setting: Setting) -> int:
    """Prompts of one generator: on one GPU, or on as many as a serving engine takes."""
    return -(-load.prompts * max(1, setting.serve) // setting.gpus)


def _generation(shape: ModelShape, setting: Setting, gpu: Gpu, load: Load, groups: int) -> Time:
    """Prefill of each prompt, then batch after batch of decoding, on each GPU its share of the prompts."""
    mine = _share(load, setting)
    prefill = prefill_time(shape, setting, gpu, load.prompt).seconds * mine / max(1, setting.serve)
    decoding = decode_time(shape, setting, gpu, load.prompt, groups, load.size, load.completion)
    decode = decoding.seconds * -(-mine // groups)
    return Time(prefill + decode, f"prefill: {prefill / (prefill + decode):.0%}, else {decoding.bound}")


def _dense_flops(shape: ModelShape, setting: Setting, load: Load) -> float:
    if not load.prompts:
        return load.rows * update_work(shape, setting, load.row, load.passes).flops
    row = Row(1, load.prompt, load.size, load.completion, shared=False)
    return load.prompts * update_work(shape, setting, row, load.passes).flops
