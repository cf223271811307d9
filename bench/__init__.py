"""One file per thing measured, peers beside us.

Imports `longreach.kernels` and `longreach.engine`, never `longreach.rl`; needs torch, triton, transformers and numpy
alone. What else is installed (rich, matplotlib, pytest-benchmark, any peer) is used where it is needed, and its absence
costs that one thing: a peer becomes a named gap row.
"""

import os

# Before torch starts: its profiler, which counts CPU memory here, announces every start and stop on stderr otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
