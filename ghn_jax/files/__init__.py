"""Files that are whole or not there, and the same as they were written."""
