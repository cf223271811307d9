"""A program that plays a server with an engine process of its own, as badly as its environment asks.

DIES=status before it listens, HEALTH=status of /health, STUBBORN=1 is deaf to SIGTERM, and so is its child.
"""

from __future__ import annotations

import http.server
import os
import signal
import subprocess
import sys
from pathlib import Path

if os.environ.get("DIES"):
    print("out of memory, or so", flush=True)
    sys.exit(int(os.environ["DIES"]))
if os.environ.get("STUBBORN"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a child inherits it

child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path(sys.argv[1]).write_text(f"{os.getpid()} {child.pid}")


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(int(os.environ.get("HEALTH", "200")))
        self.send_header("Content-Length", "0")
        self.end_headers()


class Listener(http.server.HTTPServer):
    allow_reuse_address = True  # as vLLM's socket does


assert sys.argv[2:5:2] == ["--host", "--port"]
print("listening", flush=True)
Listener((sys.argv[3], int(sys.argv[5])), Handler).serve_forever()
