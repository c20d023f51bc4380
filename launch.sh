#!/usr/bin/env bash
# Sets the project up in .venv (again only when its dependencies changed), then runs an experiment or the tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
  cat <<TEXT
./launch.sh EXPERIMENT [flags]                  set up, then python -m experiments.EXPERIMENT [flags]
./launch.sh EXPERIMENT [flags] --processes N    the same as N processes on this host
./launch.sh test [pytest's flags]               set up, then run every test; test --quick: those that take 90 s
./launch.sh lint                                set up, then check style and types
./launch.sh EXPERIMENT --help                   the experiment's flags and config

PYTHON=... chooses the interpreter (>= 3.11), JAX_EXTRA=cpu|cuda12|cuda13|tpu the JAX to install.

Experiments:
$(experiments)
TEXT
}

# Every module that can be run, with the first line of its docstring.
experiments() {
  local file
  for file in $(grep -l '^if __name__ == "__main__":' experiments/*.py); do
    printf '  %-12s %s\n' "$(basename "$file" .py)" "$(head -n 1 "$file" | sed 's/^"""//; s/"""$//')"
  done
}

fail() {
  echo "error: $*" >&2
  exit 1
}

jax_extra() {
  if [ -n "${JAX_EXTRA:-}" ]; then
    echo "$JAX_EXTRA"
  elif command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
    # Driver 580 is the first that runs CUDA 13.
    local driver
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1 | cut -d. -f1)
    if [ "$driver" -ge 580 ]; then echo cuda13; else echo cuda12; fi
  elif [ -e /dev/accel0 ] || [ -n "${TPU_NAME:-}" ]; then
    echo tpu
  else
    echo cpu
  fi
}

set_up() {
  local python="${PYTHON:-python3}" extras wanted
  command -v "$python" >/dev/null 2>&1 || fail "no interpreter '$python': install Python >= 3.11, or name one with PYTHON=..."
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version) is too old: Python >= 3.11 is needed; name one with PYTHON=..."
  extras=test
  case "$(jax_extra)" in cpu) ;; *) extras="test,$(jax_extra)" ;; esac
  # What stands under [tool.*] is no reason to install again, and to take .venv from under a run that is going on.
  wanted="$("$python" -c 'import sys; print(sys.version)') $extras $(sed '/^\[tool/,$d' pyproject.toml | cksum)"
  [ "$(cat .venv/installed 2>/dev/null)" = "$wanted" ] && return

  # Several processes may start in one folder (Slurm, TPU pods): one installs, the others wait.
  if command -v flock >/dev/null 2>&1; then
    exec 9>.install.lock
    flock 9
    [ "$(cat .venv/installed 2>/dev/null)" = "$wanted" ] && return
  fi
  echo "setting up .venv ($extras); this takes a minute or two the first time" >&2
  "$python" -m venv --clear .venv || fail "could not make .venv with $python (on Debian: apt install python3-venv)"
  if ! .venv/bin/python -m pip install --quiet --disable-pip-version-check --retries 1 --timeout 20 \
    --editable ".[$extras]" >.venv/install.log 2>&1; then
    if grep -qi 'connection\|resolution\|timed out\|unreachable\|no matching distribution' .venv/install.log; then
      fail "could not install: no package index can be reached (is there a network?); pip's words are in .venv/install.log"
    fi
    fail "could not install; pip's words are in .venv/install.log, the last: $(tail -n 1 .venv/install.log)"
  fi
  printf '%s' "$wanted" >.venv/installed
  exec 9>&-
}

# Starts N processes on this host; when one fails the others are ended and its code is ours.
run_processes() {
  local count=$1 pids=() code=0
  shift
  export DIFFUSION_NUM_PROCESSES=$count
  JAX_COORDINATOR_ADDRESS=127.0.0.1:$(.venv/bin/python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  export JAX_COORDINATOR_ADDRESS
  for ((i = 0; i < count; i++)); do
    DIFFUSION_PROCESS_ID=$i "$@" &
    pids+=($!)
  done
  trap 'kill -INT "${pids[@]}" 2>/dev/null' INT TERM
  for ((i = 0; i < count; i++)); do
    wait -n || { code=$?; kill "${pids[@]}" 2>/dev/null || true; }
  done
  return $code
}

case "${1:-}" in
"" | -h | --help)
  usage
  exit 0
  ;;
test)
  shift
  set_up
  selection=()
  if [ "${1:-}" = --quick ]; then
    shift
    selection=(-m quick)
  fi
  # A file on one core: fixtures are made once.
  exec .venv/bin/python -m pytest -n auto --dist loadfile ${selection[@]+"${selection[@]}"} "$@"
  ;;
lint)
  set_up
  .venv/bin/ruff check .
  .venv/bin/ruff format --check .
  exec .venv/bin/pyright
  ;;
esac

# On a CPU, memory that malloc gives back and asks for again is most of the page faults of a step: keep it, in huge
# pages (glibc >= 2.35; an older one ignores this).
if [ "$(jax_extra)" = cpu ]; then
  export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000}
fi

name=$1
shift
[ -n "$(experiments | awk -v name="$name" '$1 == name')" ] ||
  fail "unknown experiment '$name'; there are: $(experiments | awk '{printf "%s%s", sep, $1; sep = ", "}')"
count=1
flags=()
while [ $# -gt 0 ]; do
  case "$1" in
  --processes) count=${2:-} && shift ;;
  --processes=*) count=${1#*=} ;;
  *) flags+=("$1") ;;
  esac
  [ $# -eq 0 ] || shift
done
case "$count" in '' | *[!0-9]* | 0) fail "--processes needs a number >= 1" ;; esac
set_up
program=(.venv/bin/python -m "experiments.$name" ${flags[@]+"${flags[@]}"})
if [ "$count" -gt 1 ]; then
  run_processes "$count" "${program[@]}"
elif [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${SLURM_STEP_ID:-}" ] && [ "${SLURM_NTASKS:-1}" -gt 1 ]; then
  exec srun "${program[@]}"
else
  # On TPU pods every worker runs this script itself, and JAX finds the others.
  exec "${program[@]}"
fi
