"""What the overlay reports: the journal of a process and its reader, the log, the summary line, the metrics."""
