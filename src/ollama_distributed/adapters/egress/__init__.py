"""The one way out: every request of this program to a machine outside the cluster goes through here."""
