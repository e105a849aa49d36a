"""This node's part in its cluster: brought up, kept up, taken down."""
