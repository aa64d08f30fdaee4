"""Replay buffers: bounded memory of past samples, one policy a file."""
