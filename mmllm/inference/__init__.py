"""From prompts to answers.

Read `engine` (the decode loop, and `generate` for many prompts), then `prompt_reader` (a prompt piece by piece, with what
`prefix_store` has of it) and `sampling` (how a token is chosen). `model_runner` computes logits over the KV cache,
`static_step` does so by CUDA graphs, `counters`, `beam_search` and `text_stream` serve the engine,
`request` has what goes in and out, `optimize` prepares a model for answering, and `pipeline` is what programs call.
"""
