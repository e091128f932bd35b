"""Logits → tokens: the sampler (sampler.py) runs a list of steps (steps.py) over one batch (batch.py).

Draws are reproducible (random.py); tokens that steps look back at are on the device (history.py); what the model
thought of the drawn tokens is logprobs.py. A new step is a function and a line in steps.STEPS.
"""
