"""Pictures as files: written fast, and read from strangers in processes that may be killed."""
