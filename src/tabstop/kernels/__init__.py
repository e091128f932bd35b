"""Fused operations, each beside its twin in plain torch: the kernel runs on a GPU, the twin everywhere else.

Knows tensors and nothing of layers, requests or caches' owners. `<name>` chooses by the first tensor's device,
`<name>_triton` launches the kernel, `<name>_torch` is the twin that says what the kernel must compute. Kernels never
wait for the device, take counts as unspecialised integers, and compute in float32 whatever the tensors' type.
"""
