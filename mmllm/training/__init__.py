"""Two stages of training: experiment.py starts a run, stage.py is the loop."""
