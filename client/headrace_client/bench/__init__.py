"""`headrace bench`: load on a server, what its clients saw, and whether two such runs differ."""
