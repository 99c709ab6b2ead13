"""Records that are written to disk and read back, each with its schema, and safe ways of writing."""
