"""What a run writes for its reader, without torch. Reading order: metrics, report, curves, compare."""
