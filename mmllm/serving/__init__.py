"""The HTTP server.

Read it from the outside in: settings (every limit), http (what each request passes through), inputs (the fields of each
endpoint), app (the endpoints), service (how each of them has a request answered), conversations, events (streamed
answers), worker (the thread that owns the model), server (uvicorn, signals and draining).
"""
