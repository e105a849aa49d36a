"""One module per dialect, each a pure pair of functions. `contract.py` is their shape."""
