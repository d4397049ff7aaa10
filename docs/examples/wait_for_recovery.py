#!/usr/bin/env python3
"""Follows the events of a machine until a driver VM has failed and serves again: wait_for_recovery.py /run/umbra/web/control.sock"""
import json
import socket
import sys

control = socket.socket(socket.AF_UNIX)
control.connect(sys.argv[1])
lines = control.makefile("rw", encoding="utf-8")


def ask(after, follow):
    """The events behind number `after`, until the last one there is, or as they come."""
    print(json.dumps({"request": "events", "after": after, "follow": follow}), file=lines, flush=True)
    for answer in map(json.loads, lines):
        if answer.get("response") == "error":
            sys.exit(answer["what"])
        if answer.get("response") == "events-end":
            return
        yield answer


last = max((event["seq"] for event in ask(0, False)), default=0)
print("following", flush=True)
for event in ask(last, True):
    if event["event"] == "driver-failed":
        print(f"{event['driver']}: {event['source']}: {event['reason']}", flush=True)
    elif event["event"] == "driver-live" and event["outage_ms"] is not None:
        print(f"{event['driver']}: generation {event['generation']} serves after {event['outage_ms']:.0f} ms")
        sys.exit(0)
sys.exit("the machine has ended")
