"""The cluster's replicated state. Pure: records, their keys, and what a change makes of them."""
