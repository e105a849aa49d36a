"""Live answers: the token decoder, and what turns engine events into an answer."""
