"""`engine build`: llama-server compiled for this machine's own CPU."""
