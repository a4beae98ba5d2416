"""Files that are there whole or not at all; pickles read as data."""
