"""Scores of captions and answers, by the formulas of the official tools.

`evaluator` has the public MultimodalEvaluator; `captions`, `vqa` and `ptb` are its formulas. `run` evaluates a model:
`tasks` says what is asked and gets the answers, `results` scores and writes them.
"""
