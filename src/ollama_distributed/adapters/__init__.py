"""The world behind ports; sub-packages are independent of each other."""
