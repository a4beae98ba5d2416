"""Files and folders that are there whole or not at all; pickles and arrays read as data."""
