"""Coordination engines behind `cluster/ports.py`: NATS JetStream, and memory for simulation."""
