"""Hugging Face folders: known families, where each of their tensors goes, how their files are read and written."""
