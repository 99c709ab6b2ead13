"""Importers of public data sets: released files in, rows of our own formats out."""
