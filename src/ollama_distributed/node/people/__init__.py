"""Users and sign-in on this node: what it knows of them, and who changes it."""
