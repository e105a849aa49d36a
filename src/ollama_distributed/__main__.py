"""`python -m ollama_distributed`."""

from ollama_distributed.cli.main import main

if __name__ == "__main__":
    main()
