"""Who leads: a lease that is renewed, and an epoch that fences what a leader writes."""
