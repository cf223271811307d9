"""The benchmarks of long documents: what is asked, how a model is asked, and how its answers are counted and compared."""
