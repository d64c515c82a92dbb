"""Scores of captions and answers, by the formulas of the official tools."""
