"""Scores of captions and answers, by the formulas of the official tools.

`evaluator` has the public MultimodalEvaluator; `captions`, `cider`, `vqa` and `ptb` are its formulas. `tasks` says what a
model is asked, `predictions` gets and keeps its answers, `results` scores them with `bootstrap` intervals, `sheet` shows
them. `clip_score` needs transformers.
"""
