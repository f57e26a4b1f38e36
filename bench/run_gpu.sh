#!/usr/bin/env bash
# Everything that needs a CUDA device, in order of worth: the tests marked gpu, then the groups of the benchmark.
#
#     bench/run_gpu.sh                  results go to bench/results/<device>/ and into README's table
#     OUT=/some/folder bench/run_gpu.sh logs and JSON go to that folder as each part ends; later, in a checkout,
#                                       python -m bench.report --add /some/folder/*.json
#
# PYTHON   the interpreter (default: .venv's, else python3); it needs torch >= 2.11 with CUDA, Triton and pytest
# COMMIT   the commit that is measured, where this is no git checkout
# PARTS    what runs (default: all): tests kernels memory train generate block
# SCALE    of the benchmarks (default: full)
#
# A part whose JSON lies in OUT already is not measured again, so that a run that was cut off can go on.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-}
if [ -z "$python" ]; then
  python=python3
  [ -x .venv/bin/python ] && python=.venv/bin/python
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
parts=${PARTS:-tests kernels memory train generate block}
out=${OUT:-$(mktemp -d)}
mkdir -p "$out"
told=()
[ -n "${COMMIT:-}" ] && told=(--commit "$COMMIT")

"$python" - <<'PYTHON' || exit 1
import sys
import torch, triton
if not torch.cuda.is_available():
    sys.exit("PyTorch sees no CUDA device")
print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__, flush=True)
PYTHON

failed=()
part() {  # part NAME PYTEST_ARGUMENTS...: its output to a log, its time and last line to the screen
  local name=$1 begin=$SECONDS
  shift
  case " $parts " in *" $name "*) ;; *) return ;; esac
  "$python" -m pytest -q -p no:cacheprovider "$@" > "$out/$name.log" 2>&1 || failed+=("$name")
  echo "$name: $(tail -n 1 "$out/$name.log") ($((SECONDS - begin)) s)"
}

benchmark() {  # benchmark GROUP
  [ -s "$out/$1.json" ] && return
  part "$1" "bench/test_$1.py" --benchmark-only --scale "${SCALE:-full}" "${told[@]}" "--benchmark-json=$out/$1.part"
  [ -s "$out/$1.part" ] && mv "$out/$1.part" "$out/$1.json"
}

# Some tests need packages that a GPU machine may lack, diffusers for one; the others run.
part tests tests -m gpu --continue-on-collection-errors
for group in kernels memory train generate block; do
  benchmark "$group"
done

if [ -z "${OUT:-}" ]; then
  "$python" -m bench.report --add "$out"/*.json || failed+=(report)
fi
echo "Logs in $out${failed[*]:+; failed: ${failed[*]}}"
[ ${#failed[@]} -eq 0 ]
