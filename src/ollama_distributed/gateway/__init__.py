"""Sockets and dialects: HTTP in, internal requests through, bytes out."""
