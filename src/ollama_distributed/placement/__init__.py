"""Which node holds which model, and what follows from losing a node."""
