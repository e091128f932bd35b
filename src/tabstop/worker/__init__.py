"""Owns a device: turns plans into tensors (batch.py), runs the model (worker.py), one rank or several (group.py)."""
