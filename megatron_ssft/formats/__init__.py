"""What is written to disk and read back: every record with its schema, and safe ways of writing."""
