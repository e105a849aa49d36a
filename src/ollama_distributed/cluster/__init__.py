"""Members, leader and replicated state: the only door to consensus."""
