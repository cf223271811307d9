"""What makes a model run: loading, attention wiring, packing, generation, checkpoints."""

from .completions import completion_hidden, completion_logprobs, completion_policy_loss
from .generate import Completion, generate
from .mesh import Mesh, ParallelConfig, make_mesh
from .model import load_model, load_tokenizer
from .packing import Group, PackedRow, pack_groups
from .sampling import Sampling
from .sequences import group_sequences
from .vocab_parallel import vocab_parallel_logprob

__all__ = [
    "Completion",
    "Group",
    "Mesh",
    "PackedRow",
    "ParallelConfig",
    "Sampling",
    "completion_hidden",
    "completion_logprobs",
    "completion_policy_loss",
    "generate",
    "group_sequences",
    "load_model",
    "load_tokenizer",
    "make_mesh",
    "pack_groups",
    "vocab_parallel_logprob",
]
