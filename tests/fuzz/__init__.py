"""What strangers write, as bytes: a model's files, chat templates, request bodies, event streams, frames to the engine.

targets.py: one function a format, which raises only when we are wrong. corpus/: seeds (seeds.py makes them) and what
fuzzing found. test_corpus.py replays them in CI, each also a little damaged. By hand, with atheris (coverage-guided; no
dependency of ours):

    pip install --target FOLDER atheris==3.0.0
    PYTHONPATH=src:FOLDER python -m tests.fuzz.run gguf -max_total_time=600
"""
