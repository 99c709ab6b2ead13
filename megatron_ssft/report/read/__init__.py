"""What runs and evaluations left in their folders, read back as typed records."""
