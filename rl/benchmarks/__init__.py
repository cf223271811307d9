"""Benchmarks of reading long documents: where their questions come from, how they are laid out, how they are run."""
