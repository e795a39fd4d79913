"""A step that a preloaded process runs behaves as one that runs by itself."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from sla2 import preload

CLIENT = "import sys; from sla2.preload import hand_over; code = hand_over('job', sys.argv); sys.exit(99 if code is None else code)"
JOB = """
import json, os, sys, time
if sys.argv[1] == "facts":
    import torch
    print(json.dumps([sys.argv[1:], os.getcwd(), os.environ["COLOR"], "decimal" in sys.modules]))
    print("to stderr", file=sys.stderr)
elif sys.argv[1] == "wait":
    try:  # before the line that the test waits for, or its signal may come too early
        print(os.getpid(), flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        sys.exit(130)
elif sys.argv[1] == "fail":
    raise ValueError("what went wrong")
else:
    sys.exit(int(sys.argv[1]))
"""


def as_at_a_terminal() -> None:
    """What a script starts in its background ignores Ctrl-C, and so would all that these tests start there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def server(tmp_path):
    """A server that has imported `decimal`, in a folder with a module `job`."""
    (tmp_path / "job.py").write_text(JOB)
    code = f"from sla2.preload import serve; serve({str(tmp_path / 'socket/jobs')!r}, {os.getpid()}, ('decimal',))"
    (tmp_path / "socket").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, preexec_fn=as_at_a_terminal)
    while not (tmp_path / "socket/jobs").exists():
        assert process.poll() is None
        time.sleep(0.01)
    yield process
    process.terminate()
    assert process.wait() == 0
    assert not (tmp_path / "socket").exists()


def client(tmp_path, *arguments: str, **options) -> subprocess.Popen:
    environment = {**os.environ, preload.SOCKET: str(tmp_path / "socket/jobs"), "COLOR": "teal"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", CLIENT, *arguments], env=environment, **pipes, **options)


def gone(pid: int) -> bool:
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


def test_arguments_folder_environment_and_files_reach_the_job(server, tmp_path):
    job = client(tmp_path, "facts", "a b", cwd=tmp_path / "socket")
    out, err = job.communicate()
    assert json.loads(out) == [["facts", "a b"], str(tmp_path / "socket"), "teal", True]
    assert err == "to stderr\n"
    assert job.returncode == 0


@pytest.mark.parametrize("status", [0, 2, 130])
def test_exit_status_is_the_jobs(server, tmp_path, status):
    assert client(tmp_path, str(status)).wait() == status


def test_uncaught_error_shows_as_usual(server, tmp_path):
    job = client(tmp_path, "fail")
    _, err = job.communicate()
    assert err.endswith("ValueError: what went wrong\n")
    assert job.returncode == 1


def test_jobs_run_beside_each_other(server, tmp_path):
    jobs = [client(tmp_path, "wait") for _ in range(3)]
    assert len({job.stdout.readline() for job in jobs}) == 3
    for job in jobs:
        job.terminate()
        assert job.wait() == 128 + signal.SIGKILL


def test_interrupt_reaches_the_job(server, tmp_path):
    job = client(tmp_path, "wait")
    job.stdout.readline()
    job.send_signal(signal.SIGINT)
    assert job.wait() == 130


def test_killed_client_takes_its_job_along(server, tmp_path):
    job = client(tmp_path, "wait")
    pid = int(job.stdout.readline())
    job.kill()
    assert gone(pid)


def test_nobody_listens(tmp_path):
    assert client(tmp_path, "0").wait() == 99


def test_server_ends_with_the_process_that_started_it(tmp_path):
    (tmp_path / "socket").mkdir()
    code = f"from sla2.preload import serve; serve({str(tmp_path / 'socket/jobs')!r}, 1, ('decimal',))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)
    assert not (tmp_path / "socket").exists()


def test_preloading_is_cheap_to_import():
    code = "import sys, sla2.preload; assert not {'torch', 'numpy', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
