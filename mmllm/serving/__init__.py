"""The HTTP server.

Read it from the outside in: settings (every limit), http (what each request passes through), inputs (the fields of each
endpoint), app (the endpoints), chat_completions (those of OpenAI's API), service (how a request is answered),
conversations, events (streamed answers), worker (the thread that owns the model), server (uvicorn, signals, draining), and
page, which serves page.html to a browser.
"""
