#!/usr/bin/env bash
# After a run of pytest over the tests $2 that ended with $1: a few tests that failed beside others go
# once more without them, and what failed only once is told. A defect fails twice; a slow neighbour alone
# refuses no change. More than a few, or a run that broke off, stay what they are.
set -euo pipefail
MOST=3
cache=.pytest_cache/v/cache/lastfailed
[ "$1" = 1 ] && [ -f "$cache" ] || exit "$1"
mapfile -t failed < <(sed -nE 's/^ *"(.*)": true,?$/\1/p' "$cache")
[ "${#failed[@]}" -ge 1 ] && [ "${#failed[@]}" -le "$MOST" ] || exit "$1"
echo "── failed beside others, once more without them: ──"
printf '  %s\n' "${failed[@]}"
.venv/bin/python -m pytest --no-header --last-failed --last-failed-no-failures none "${@:2}"
echo "── UNSTABLE: passed only without others. Mend: ──"
printf '  %s\n' "${failed[@]}"
