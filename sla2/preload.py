"""Jobs without the wait for imports: one process imports the heavy libraries and forks a child for each job.

torch, diffusers, open_clip and torchmetrics cost ten to twenty seconds of a core, and a study is dozens of short jobs. The
Snakefile starts `serve` for the length of a run and names its socket in the environment; the command `sla2` then hands its step
over, with its arguments, folder, environment and open files, and ends as the step ends. Where nobody listens (a cluster's node, a
command typed by hand, a server that is still importing) the step runs in its own process: the same code, only later.
"""

import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

SOCKET = "SLA2_PRELOADED"  # environment variable with the path of the socket
HEAVY = (
    "torch",
    "diffusers.WanPipeline",
    "diffusers.WanTransformer3DModel",
    "transformers.UMT5EncoderModel",
    "open_clip",
    "torchmetrics.functional.image",
    "cv2",
    "sla2_kernels",
)
LENGTH = struct.Struct("!i")


def start(folder: Path) -> subprocess.Popen:
    """Start a server whose socket lies in `folder`, and name it to the processes that this one starts."""
    os.environ[SOCKET] = str(folder / "jobs")
    # torch otherwise asks the driver for GPUs while it is imported, after which no forked child could use one.
    environment = {**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sla2.preload", os.environ[SOCKET], str(os.getpid())]
    nowhere = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    return subprocess.Popen(command, env=environment, start_new_session=True, **nowhere)


def serve(path: str, parent: int, modules: tuple[str, ...] = HEAVY) -> None:
    """Import, then fork a child for each connection, until the process `parent`, which started this one, is gone."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        _import(modules)
        _listen(path, parent)
    finally:
        shutil.rmtree(Path(path).parent, ignore_errors=True)


def _import(modules: tuple[str, ...]) -> None:
    for name in modules:
        module, _, attribute = name.rpartition(".")
        if module and attribute[0].isupper():
            getattr(importlib.import_module(module), attribute)
        else:
            importlib.import_module(name)


def _listen(path: str, parent: int) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children here; their clients do
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(64)
        while os.getppid() == parent:
            if not select.select([server], [], [], 1.0)[0]:
                continue
            connection, _ = server.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                server.close()
                try:
                    _child(connection)
                finally:  # a client that left half-way must not have the server's own cleaning up run here
                    os._exit(1)
            connection.close()


def _child(connection: socket.socket) -> None:
    """Become the job that a client asks for; never returns."""
    size, files, _, _ = socket.recv_fds(connection, LENGTH.size, 3)
    job = json.loads(_receive(connection, LENGTH.unpack(size)[0]))
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    sys.argv = job["arguments"]
    connection.sendall(LENGTH.pack(os.getpid()))
    threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
    code = 1
    try:
        runpy.run_module(job["module"], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        connection.sendall(LENGTH.pack(code))
        os._exit(code)


def _end_with(connection: socket.socket) -> None:
    """End this process when its client is gone: a killed job must not go on writing beside the one that follows it."""
    connection.recv(1)
    os._exit(128 + signal.SIGKILL)


def hand_over(module: str, arguments: list[str]) -> int | None:
    """Have the server run a step; returns its exit status, or None when nobody listens."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(os.environ.get(SOCKET, ""))
    except OSError:
        return None
    job = {"module": module, "arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    payload = json.dumps(job).encode()
    passed_on = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, passed_on)  # until there is a job to pass them on to
    socket.send_fds(connection, [LENGTH.pack(len(payload))], [0, 1, 2])
    connection.sendall(payload)
    (child,) = LENGTH.unpack(_receive(connection, LENGTH.size))
    for number in passed_on:
        signal.signal(number, lambda received, _: os.kill(child, received))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, passed_on)
    answer = _receive(connection, LENGTH.size)
    return LENGTH.unpack(answer)[0] if answer else 128 + signal.SIGKILL


def _receive(connection: socket.socket, size: int) -> bytes:
    """`size` bytes, or none when the other side is gone."""
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            return b""
        data += part
    return data


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
