"""The server: an OpenAI-compatible HTTP API and a page over one Engine, `exlstm serve MODEL`."""
