"""The public recipe: published weights, public data, all stages, official scores, and a report with the targets beside it.

`recipe` runs the commands, `report` reads what they left.
"""
