"""Which node answers a request: candidates, choice, tries."""
