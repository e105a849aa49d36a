"""Who may do what: identities and the keys that prove them."""
