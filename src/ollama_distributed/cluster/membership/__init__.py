"""Who lives: heartbeats, and the leader's record of who joined, fell silent and came back."""
