"""Kernels that no GPU has run yet: compile-tested, simulated on a CPU, taken by name alone and never by `auto`."""
