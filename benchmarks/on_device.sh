#!/usr/bin/env bash
# Measure this checkout on a machine with an accelerator and no network, in under 9 minutes:
#
#   benchmarks/on_device.sh BACKEND OUT_DIR
#
# Uses the machine's own python3, its torch above all, and needs PortNet's dependencies there (or on PYTHONPATH). What
# matters most comes first: the conformance suite on small networks, then every stack of the backend, the most telling
# first, as much as fits, then what its libraries are worth. A step that fails or runs out of time is named in the table
# at the end, and the next one runs. OUT_DIR gets log.txt, records.tar.gz and summary.txt. Exit status: 0 if every step
# passed, otherwise 1; 2 for a wrong call. PORTNET_OPTIONS are more options for the measurements: with "--image-size 67"
# a small machine without an accelerator can try it all.
set -uo pipefail

if [ $# -ne 2 ]; then
  sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
backend=$1
mkdir -p "$2" || exit 2
out=$(cd "$2" && pwd)
checkout=$(cd "$(dirname "$0")/.." && pwd)

budget=${PORTNET_BUDGET:-515} # seconds for all steps; the rest of 9 minutes is for packing
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/site" "$work/source" "$work/records"
cd "$work/records" || exit 2 # away from the checkout, so that the installation is what runs
export PYTHONUNBUFFERED=1 PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
portnet=(python3 -m portnet.cli)
ablated=bfloat16
read -ra options <<<"${PORTNET_OPTIONS:-}"
failed=0
: >"$out/summary.txt"
: >"$out/log.txt"

# step NAME SECONDS COMMAND...: run it within its time and what is left of the budget, and note how it went.
step() {
  local name=$1 limit=$2 left=$((budget - SECONDS)) started=$SECONDS status verdict
  shift 2
  if [ "$left" -lt 10 ]; then
    failed=1
    printf '%-12s %5s  %s\n' "$name" - "not run: no time left" >>"$out/summary.txt"
    return
  fi
  echo "== $name: $*" | tee -a "$out/log.txt"
  if command -v timeout >/dev/null; then # macOS has none
    set -- timeout --kill-after=5 "$((limit < left ? limit : left))" "$@"
  fi
  "$@" </dev/null 2>&1 | tee "$work/step.log"
  status=${PIPESTATUS[0]}
  cat "$work/step.log" >>"$out/log.txt"
  case $status in
    0) verdict=passed ;;
    124 | 137) verdict="out of time" ;;
    *) verdict="failed ($status): $(tail -n 1 "$work/step.log" | cut -c1-150)" ;;
  esac
  [ "$status" -eq 0 ] || failed=1
  printf '%-12s %4ss  %s\n' "$name" $((SECONDS - started)) "$verdict" >>"$out/summary.txt"
}

# A build leaves files behind, and what is left of an older one would get into the wheel: build from a copy.
for path in pyproject.toml README.md LICENSE portnet backends; do
  cp -R "$checkout/$path" "$work/source/"
done
offline=(--quiet --no-index --no-deps --no-build-isolation --no-compile)
step install 90 python3 -m pip install "${offline[@]}" --target "$work/site" "$work/source"

step backends 60 "${portnet[@]}" backends
step check 150 "${portnet[@]}" check "$backend" --image-size 67
# A budget ends between two rounds; the steps' own limits are for what hangs.
step measure 220 "${portnet[@]}" measure --all --backends "$backend" --batch 128 --batch 1024 --quick --rounds 3 \
  --budget 190s --timeout 100 --out measured ${options[@]+"${options[@]}"}
step ablate 110 "${portnet[@]}" ablate "$backend/$ablated" --mode train --batch 128 --quick --rounds 2 \
  --budget 90s --timeout 60 --out ablated ${options[@]+"${options[@]}"}

# One file of them all: what fetches results from such a machine may take only a few.
tar -czf "$out/records.tar.gz" -C "$work/records" .
{
  echo
  echo "portnet on $backend, torch $(python3 -c 'import torch; print(torch.__version__)' 2>/dev/null || echo missing)"
  cat "$out/summary.txt"
} | tee -a "$out/log.txt"
exit "$failed"
