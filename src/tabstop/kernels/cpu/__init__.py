"""The CPU's kernels: one C++ library without torch headers, compiled on this machine and called through ctypes.

build.py compiles and keeps it, library.py says what is in it, program.py runs a whole step in one call. The twins in
plain torch are quant/tiles.py's (weights and products), attention/reference.py (attention) and the layers (steps).
"""
