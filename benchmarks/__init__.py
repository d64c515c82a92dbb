"""Measurements of this program beside others doing the same work; rows are kept as JSON lines."""
