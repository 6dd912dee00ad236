"""Parity with tensors recorded from the published code: `python -m tests.parity FOLDER ...`."""
