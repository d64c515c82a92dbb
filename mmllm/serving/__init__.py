"""The HTTP server: app, bounded requests, event streams, conversations, one worker thread."""
