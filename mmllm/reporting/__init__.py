"""What a run leaves to read: metrics, report, loss curves, comparisons of runs."""
