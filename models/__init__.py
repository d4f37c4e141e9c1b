"""Models that others trained: what is known of them, where their files are, and how they are to be sampled."""
