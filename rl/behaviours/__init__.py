"""Grounding, subgoal setting, backtracking and verification: counted in a run's responses, with a judge and without one."""
