"""Files and batches: requests by the thousand that nobody waits for, in slots that are idle."""
