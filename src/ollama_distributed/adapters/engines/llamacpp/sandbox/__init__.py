"""The cage of a runner: which files, calls and rights its process keeps (ADR 28)."""
