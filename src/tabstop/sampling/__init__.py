"""Logits → tokens: the sampler is a list of steps over one batch (sampler.py); draws are reproducible (random.py)."""
