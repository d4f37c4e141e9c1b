"""Several servers of one engine each behind one address, by Ray Serve."""
