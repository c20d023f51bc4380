#!/usr/bin/env bash
# Sets the project up in .venv (again only when its dependencies changed), then runs an experiment or the tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
  cat <<TEXT
./launch.sh EXPERIMENT [flags]                  set up, then python -m experiments.EXPERIMENT [flags]
./launch.sh EXPERIMENT [flags] --processes N    the same as N processes on this host
./launch.sh sweep EXPERIMENT --set FIELD=A,B    a run per value, then one table and one figure; sweep --help
./launch.sh test [pytest's flags]               set up, then run every test; test --quick: those that take 90 s
./launch.sh demo --workdir=RUN                  set up, then serve trained runs on a page (docs/demo.md)
./launch.sh lint                                set up, then check style and types
./launch.sh EXPERIMENT --help                   the experiment's flags and config

PYTHON=... chooses the interpreter (>= 3.11), JAX_EXTRA=cpu|cuda12|cuda13|tpu the JAX to install; versions are those of
constraints-*.txt, or of CONSTRAINTS=FILE. uv installs where it is there, else pip.

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

# The newest constraints-X.Y.txt whose X.Y is not above that of the interpreter; CONSTRAINTS=FILE names another.
constraints() {
  local version=$1 file best=
  [ -z "${CONSTRAINTS:-}" ] || { echo "$CONSTRAINTS"; return; }
  for file in $(printf '%s\n' constraints-*.txt | sort -V); do
    [ "$(printf '%s\n' "constraints-$version.txt" "$file" | sort -V | head -n 1)" = "$file" ] && best=$file
  done
  echo "${best:-/dev/null}"
}

# Installs the extras into .venv: by uv where it is there and gets through, else by pip.
install() {
  local python=$1 extras=$2 pins=$3
  if command -v uv >/dev/null 2>&1; then
    if [ ! -x .venv/bin/python ]; then uv venv --quiet --seed --python "$(command -v "$python")" .venv || return 1; fi
    uv pip install --quiet --compile-bytecode --python .venv/bin/python --constraint "$pins" --editable ".[$extras]" && return
    echo "uv could not install; pip tries"
  fi
  if [ ! -x .venv/bin/python ]; then
    "$python" -m venv .venv || { echo "could not make .venv with $python (on Debian: apt install python3-venv)" && return 1; }
  fi
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --retries 1 --timeout 20 \
    --constraint "$pins" --editable ".[$extras]"
}

# set_up [EXTRA...]: makes .venv with these extras of pyproject.toml, beside those of every command.
set_up() {
  local python="${PYTHON:-python3}" version extra pins wanted have extras="all test" log=.install.log
  command -v "$python" >/dev/null 2>&1 || fail "no interpreter '$python': install Python >= 3.11, or name one with PYTHON=..."
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version) is too old: Python >= 3.11 is needed; name one with PYTHON=..."
  case "$(jax_extra)" in cpu) ;; *) extras="$extras $(jax_extra)" ;; esac
  extras="$extras $*"
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  pins=$(constraints "$version")
  [ -r "$pins" ] || fail "CONSTRAINTS=$pins: there is no such file"
  # What stands under [tool.*] is no reason to install again.
  wanted="$("$python" -c 'import sys; print(sys.version)') $({ sed '/^\[tool/,$d' pyproject.toml; cat "$pins"; } | cksum)"
  installed && return

  # Several processes may start in one folder (Slurm, TPU pods): one installs, the others wait.
  if command -v flock >/dev/null 2>&1; then
    exec 9>.install.lock
    flock 9
    installed && return
  fi
  # What was installed by this interpreter is brought up to date in its place, and not taken from under a run that is
  # going on; extras that other commands asked for stay.
  have=
  if [ "$(head -n 1 .venv/installed 2>/dev/null | sed 's/ [0-9]* [0-9]*$//')" = "${wanted% * *}" ]; then
    have=$(sed -n 2p .venv/installed)
  else
    rm -rf .venv
  fi
  for extra in $have; do
    case " $extras " in *" $extra "*) ;; *) extras="$extras $extra" ;; esac
  done
  extras=$(echo $extras)
  echo "setting up .venv (${extras// /, }); this takes a minute or two the first time" >&2
  if ! install "$python" "${extras// /,}" "$pins" >"$log" 2>&1; then
    if grep -qi 'connection\|resolution\|timed out\|unreachable\|no matching distribution' "$log"; then
      fail "could not install: no package index can be reached (is there a network?), or it has not what $pins names (CONSTRAINTS=/dev/null takes the newest); pip's words are in $log"
    fi
    fail "could not install; pip's words are in $log, the last: $(tail -n 1 "$log")"
  fi
  printf '%s\n' "$wanted" "$extras" >.venv/installed
  exec 9>&-
}

# Whether .venv is what set_up wants, with all extras that it wants.
installed() {
  local extra
  [ "$(head -n 1 .venv/installed 2>/dev/null)" = "$wanted" ] || return 1
  for extra in $extras; do
    case " $(sed -n 2p .venv/installed) " in *" $extra "*) ;; *) return 1 ;; esac
  done
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

if [ "$1" = demo ]; then
  shift
  set_up demo
  exec .venv/bin/python -m diffusion.demo "$@"
fi

name=$1
shift
if [ "$name" = sweep ]; then
  set_up
  exec .venv/bin/python -m diffusion.runs.sweeps "$@"
fi
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
