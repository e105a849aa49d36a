"""Events over a WebSocket: channels that are asked while somebody listens, and who listens."""
