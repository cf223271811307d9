"""Stands in for flash-attn on a CPU, so that ring-flash-attn can run: plain torch, in the dtype of its inputs."""
