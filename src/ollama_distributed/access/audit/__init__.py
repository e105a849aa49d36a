"""Who did what: a chain of records per node, in which no record can be changed unseen."""
