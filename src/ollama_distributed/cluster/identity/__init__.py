"""Who belongs to the cluster: its CA, node certificates, join tokens and NATS credentials."""
