"""Generation by servers of their own: started, watched, asked over HTTP. Nothing here imports vLLM."""
