"""The programs: parse flags, build, run, close."""
