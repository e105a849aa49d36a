"""NATS JetStream: the server as a child process, and the client that speaks the port."""
