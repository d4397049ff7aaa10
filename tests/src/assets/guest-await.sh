#!/bin/busybox sh
# await SECONDS COMMAND...: runs the command until it succeeds; the seconds are those of the reference machine.
n=$(($1 * 20 * ${UMBRA_PATIENCE:-1})); shift
while ! "$@" >/dev/null 2>&1; do n=$((n - 1)); [ $n -gt 0 ] || exit 1; usleep 50000; done
