"""From prompts to answers.

Read `engine` (the decode loop), then `sampling` (how a token is chosen). `model_runner` computes logits over the KV cache,
`static_step` does so by CUDA graphs or compiled code, `beam_search` and `text_stream` serve the engine, `request` has
what goes in and out, `optimize` prepares a model for answering, and `pipeline` and `generate` are what programs call.
"""
