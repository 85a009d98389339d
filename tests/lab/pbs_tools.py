"""pbsdsh and pbs_tmrsh of the stand-in (pbs.py): `pbs_tools.py SOCKET pbsdsh -n 1 -- date`.

They ask the stand-in to start a command on a host, and show what it answers.
"""

import getopt
import json
import os
import signal
import socket
import sys

# What a released pbsdsh prints for options that it does not have, such as Torque's -h and -u.
USAGE = """Usage: pbsdsh [-c copies][-s][-v][-o] -- program [args...]
       pbsdsh [-n node_index][-s][-v][-o] -- program [args...]"""

path, tool, *words = sys.argv[1:]
request = {"job": os.environ["PBS_JOBID"], "host": None, "line": None}
if tool == "pbs_tmrsh":
    request["host"] = words.pop(0)
else:
    try:
        options, words = getopt.gnu_getopt(words, "c:n:svo")
    except getopt.GetoptError as error:
        print(f"pbsdsh: {error}", USAGE, sep="\n", file=sys.stderr)
        sys.exit(1)
    if unknown := [name for name, _ in options if name != "-n"]:
        sys.exit(f"pbsdsh: the stand-in does not imitate {unknown}")
    request["line"] = dict(options).get("-n")  # of the node file, from 0

connection = socket.socket(socket.AF_UNIX)
connection.connect(path)
connection.sendall(json.dumps(request | {"words": words}).encode() + b"\n")
if tool == "pbsdsh":  # passes TERM on and leaves at once; pbs_tmrsh just dies

    def leave(number, frame):
        print("pbsdsh: killing task 0x00000000 signal 15", flush=True)
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
