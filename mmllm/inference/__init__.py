"""From prompts to answers: pipeline, engine, sampling, beam search."""
