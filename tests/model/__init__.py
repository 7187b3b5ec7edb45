"""The rules of dispatch and pool as a model, against the real code."""
