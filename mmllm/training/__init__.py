"""Training: from a configuration to checkpoints and a report.

Read step.py (one optimizer step), stage.py (the loop) and run.py (saving and stopping), then experiment.py, which puts
them together, with reward.py (stage 3), prepare.py (the model before training), resume.py (where a run begins) and
validation.py. fsdp.py shards the model over processes. dry_run.py, data_plan.py and step_memory.py plan a run,
out_of_memory.py says what to try.
"""
