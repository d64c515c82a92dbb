"""Scores of captions and answers, by the formulas of the official tools.

`evaluator` has the public MultimodalEvaluator; `captions`, `vqa` and `ptb` are its formulas. `tasks` says
what a model is asked and gets its answers, `results` scores and writes them.
"""
