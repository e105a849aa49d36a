"""The cluster's replicated state and how a change applies to it. Pure."""
