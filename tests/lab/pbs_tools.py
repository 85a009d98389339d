"""pbsdsh and pbs_tmrsh of the stand-in (pbs.py): `pbs_tools.py SOCKET pbsdsh -h node2 -- date`.

They ask the stand-in to start a command on a host, and show what it answers.
"""

import json
import os
import signal
import socket
import sys

path, tool, *words = sys.argv[1:]
request = {"job": os.environ["PBS_JOBID"], "host": None, "line": None}
if tool == "pbs_tmrsh":
    request["host"] = words.pop(0)
while tool == "pbsdsh" and words and words[0].startswith("-"):
    option = words.pop(0)
    if option == "--":
        break
    if option not in ("-h", "-n"):
        sys.exit(f"pbsdsh: unknown option {option}")
    request["host" if option == "-h" else "line"] = words.pop(0)

connection = socket.socket(socket.AF_UNIX)
connection.connect(path)
connection.sendall(json.dumps(request | {"words": words}).encode() + b"\n")
if tool == "pbsdsh":  # passes TERM on and leaves at once; pbs_tmrsh just dies

    def leave(number, frame):
        connection.sendall(b"TERM\n")
        os._exit(0)

    signal.signal(signal.SIGTERM, leave)

for line in connection.makefile():
    answer = json.loads(line)
    if "error" in answer:
        sys.exit(f"{tool}: {answer['error']}")
    if tool == "pbs_tmrsh":
        sys.exit(answer["status"])
    if answer["status"]:
        print(f"pbsdsh: task {answer['task']:#010x} exit status {answer['status']}", flush=True)
