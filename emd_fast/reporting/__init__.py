"""Pictures, the report of a run, its log and its progress."""
