"""transformers imports any top-level `kernels` it finds: ours, from the repository's root, must do it no harm."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import sys
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
import kernels
assert kernels.__file__.startswith(sys.argv[1]), kernels.__file__
assert not hasattr(kernels, "__version__")
config = Qwen3Config(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=1, head_dim=8)
logits = Qwen3ForCausalLM(config)(torch.arange(5)[None]).logits
assert torch.isfinite(logits).all()
hidden = torch.randn(5, 16)
print(kernels.linear_logprob(hidden, torch.randn(32, 16), torch.arange(5)).logp.shape[0])
"""


def test_a_model_runs_beside_the_bare_package() -> None:
    command = [sys.executable, "-c", PROGRAM, str(ROOT)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["5"]


def test_it_imports_nothing_of_transformers() -> None:
    program = "import sys, kernels; print([name for name in sys.modules if name.startswith('transformers')])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
