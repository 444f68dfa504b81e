"""Readers of data in memory, files, functions and loaders; one module for each file format."""
