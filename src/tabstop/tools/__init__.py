"""Tools: what a request offers, how a model writes calls of them, and how calls of earlier turns are shown to it."""
