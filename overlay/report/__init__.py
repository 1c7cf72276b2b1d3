"""What the overlay reports: the journal and its reader, the log, the summary line, the metrics."""
