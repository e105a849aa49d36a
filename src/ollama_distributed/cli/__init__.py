"""Commands: parse, call the SDK, print."""
