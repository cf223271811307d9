"""What is learned: data, prompts, rewards, sampling, SFT, the RL loop, evaluation, reports, recipes, the command line."""

from .evaluate import evaluate
from .train import train

__all__ = ["evaluate", "train"]
