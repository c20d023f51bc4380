#!/usr/bin/env bash
# What is to be known of a GPU, within ten minutes: are its numbers right, and how fast are the exact U-Net and an MM-DiT
# beside compiled PyTorch? That compiles while ours does. Results go to the folder that is named, benchmarks/results by
# default. Which cut of the fused norms is best is asked of benchmarks.norms.
#
#     benchmarks/on_gpu.sh [FOLDER]        PYTHON=... names the interpreter, PEER=... one with torch and diffusers
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-benchmarks/results}
python=${PYTHON:-python3}
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.45} # the peer needs the rest
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}
code=0
timeout 160 "$python" -m benchmarks.gpu_check --json "$out/gpu_check.json" || code=$?
timeout 250 "$python" -m benchmarks.unet --batch "${BATCH:-512}" --dtype bfloat16 --rounds 5 --count 20 --fused_norms --cublas \
  --peer_python "${PEER:-$python}" --peer_modes compiled --peer_first --json "$out/unet_gpu.json" || code=$?
timeout 180 "$python" -m benchmarks.mmdit --batch 256 --width 768 --depth 12 --dtype bfloat16 --rounds 5 --count 20 --cublas \
  --peer_python "${PEER:-$python}" --peer_modes compiled --peer_first --json "$out/mmdit_gpu.json" || code=$?
exit $code
