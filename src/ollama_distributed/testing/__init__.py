"""Shipped fakes and conformance suites. Nothing a node runs in production lives here."""
