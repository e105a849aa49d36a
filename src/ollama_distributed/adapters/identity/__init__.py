"""Identity in the world: files of keys, TLS contexts, the join handshake over HTTPS."""
