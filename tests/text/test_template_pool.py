"""The life of the processes that render chat templates."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from inferneo_jax.errors import EngineError
from inferneo_jax.text import template_pool, template_protocol
from inferneo_jax.text.template_pool import TemplatePool, WorkerEndedError
from tests.support.paths import ROOT
from tests.support.waiting import until

ENDLESS = b"{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def pool():
    made = TemplatePool()
    made.start()
    yield made
    pids = made.pids()
    made.close()
    assert not any(is_there(pid) for pid in pids), "a worker is left, or its zombie"


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def ask(pool: TemplatePool, source: bytes, seconds: float = 5.0, **context) -> str:
    answer = pool.ask(source, json.dumps(context or {"x": 1}).encode(), seconds)
    assert answer.kind == template_protocol.TEXT, answer
    return answer.text


def test_the_workers_are_kept(pool):
    pids = pool.pids()
    assert len(pids) == template_pool.WORKERS
    for n in range(20):
        assert ask(pool, b"{{ n }}", n=n) == str(n)
    assert sorted(pool.pids()) == sorted(pids)


@linux
def test_a_worker_is_confined_before_it_reads_a_request(pool):
    ask(pool, b"")
    pid = pool._idle[-1].pid
    assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    assert {each.partition(b"=")[0] for each in variables} <= {b"", b"TZ", b"LD_LIBRARY_PATH"}
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (files, files)
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC):
        assert resource.prlimit(pid, kind) == (0, 0)
    soft, hard = resource.prlimit(pid, resource.RLIMIT_AS)
    assert soft == hard < template_protocol.MEMORY_BYTES + (40 << 20)
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    [resident] = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    assert resident < 32_000, "kB"


@linux
@pytest.mark.parametrize(
    "attempt",
    [
        "open('/etc/passwd')",
        "os.kill(os.getppid(), 0)",
        "os.execv('/bin/true', ['true'])",
        "os.fork()",
        "os.pipe()",
        "os.unlink('/nothing')",
        "signal.signal(signal.SIGPROF, signal.SIG_IGN)",
        "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "_socket.socket()",
    ],
)
def test_what_gets_out_of_the_sandbox_can_only_compute(attempt):
    code = (
        "import _socket, os, resource, signal, sys\n"
        "from inferneo_jax.text.template_syscalls import leave_few_system_calls\n"
        "if not leave_few_system_calls(): sys.exit(77)\n"
        f"try: {attempt}\n"
        "except (PermissionError, ValueError): sys.exit(0)\n"  # setrlimit raises the latter
        "sys.exit(1)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60
    )
    if run.returncode == 77:
        pytest.skip("this kernel has no seccomp, or this machine's calls are not known")
    assert run.returncode == 0


@linux
def test_a_worker_imports_only_the_standard_library_and_jinja(pool):
    ask(pool, b"")
    maps = Path(f"/proc/{pool._idle[-1].pid}/maps").read_text()
    assert not [name for name in ("jax", "numpy", "tokenizers", "libssl") if name in maps]


@pytest.mark.parametrize(
    "source", [ENDLESS, b"{{ x * 99999 ** 999 }}{{ 1.5 | round(20000000, 'ceil') }}"]
)
def test_the_kernel_ends_a_request_by_its_cpu_time(pool, source, monkeypatch):
    """Not the parent, whose clock also runs while other programs have the processors."""
    monkeypatch.setattr(template_pool, "WAIT_FACTOR", 300)
    with pytest.raises(WorkerEndedError, match=r"more than 0\.2 seconds of CPU time"):
        pool.ask(source, b'{"x": 1}', 0.2)


def test_a_worker_that_is_killed_is_replaced_at_once(pool):
    before = pool.pids()
    with pytest.raises(WorkerEndedError, match="seconds"):
        pool.ask(ENDLESS, b"{}", 0.1)
    after = pool.pids()
    assert len(after) == template_pool.WORKERS
    assert len(set(before) - set(after)) == 1
    assert not is_there(*set(before) - set(after))
    assert ask(pool, b"ok") == "ok"


def test_a_worker_without_memory_is_replaced(pool):
    before = pool.pids()
    answer = pool.ask(b"{{ x * 2000000000 }}", b'{"x": "a"}', 5.0)
    assert answer.kind == template_protocol.MEMORY
    assert len(set(before) - set(pool.pids())) == 1


@linux
def test_a_worker_that_keeps_memory_is_replaced(pool):
    before = pool.pids()
    kept = b"{{ '" + b"x" * 9_000_000 + b"' | length }}"  # a constant of a template that is cached
    assert ask(pool, kept) == "9000000"
    assert ask(pool, kept.replace(b"x", b"y")) == "9000000"
    assert set(before) != set(pool.pids())


def test_a_worker_that_was_killed_while_idle_is_replaced(pool):
    ask(pool, b"")
    before = pool.pids()
    for worker in pool._idle:
        os.kill(worker.pid, signal.SIGKILL)
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
    assert ask(pool, b"ok") == "ok"
    assert ask(pool, b"ok") == "ok"
    assert before != pool.pids()


def test_a_worker_that_does_not_answer_is_killed(pool):
    ask(pool, b"")
    stopped = pool._idle[-1].pid
    os.kill(stopped, signal.SIGSTOP)
    with pytest.raises(WorkerEndedError, match=r"did not end within 0\.4 seconds"):
        pool.ask(b"ok", b"{}", 0.1)
    assert not is_there(stopped)
    assert ask(pool, b"ok") == "ok"


def test_one_endless_rendering_holds_up_nobody(pool):
    with ThreadPoolExecutor(1) as threads:
        endless = threads.submit(pool.ask, ENDLESS, b"{}", 2.0)
        for n in range(20):
            assert ask(pool, b"{{ n }}", n=n) == str(n)
        assert not endless.done()
        with pytest.raises(WorkerEndedError):
            endless.result()


def test_more_threads_than_workers_take_turns(pool):
    with ThreadPoolExecutor(8) as threads:
        texts = list(threads.map(lambda n: ask(pool, b"{{ n }}", n=n), range(200)))
    assert texts == [str(n) for n in range(200)]
    assert len(pool.pids()) == template_pool.WORKERS


def test_nothing_in_a_worker_sends_more_than_may_be_sent(monkeypatch):
    header = template_protocol.ANSWER
    liar = (
        "import os; os.write(0, {!r}); os.read(0, 1); os.write(0, {!r}); "
        "[os.write(0, bytes(65536)) for _ in iter(int, 1)]"
    ).format(header.pack(b"+", 0, 0), header.pack(b"t", 0, template_protocol.MAX_BYTES + 1))
    monkeypatch.setattr(template_pool, "_START", liar)
    pool = TemplatePool()
    with pytest.raises(WorkerEndedError):
        pool.ask(b"", b"{}", 5.0)
    pool.close()


def test_a_worker_that_does_not_start_says_how_to_see_why(monkeypatch):
    monkeypatch.setattr(template_pool, "_START", "raise SystemExit(3)")
    pool = TemplatePool()
    with pytest.raises(EngineError, match=r"exit code 3\); to see why, run: .*python"):
        pool.ask(b"", b"{}", 5.0)
    pool.close()
    with pytest.raises(EngineError, match="has been ended"):
        pool.ask(b"", b"{}", 5.0)


def test_templates_see_the_time_of_this_machine(monkeypatch):
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    pool = TemplatePool()
    zone = ask(pool, b"{{ strftime_now('%H') }}")
    pool.close()
    hours = (time.gmtime().tm_hour + 14 - int(zone)) % 24
    assert hours in (0, 1), "the hour may have ended meanwhile"


def script(code: str, end: str) -> list[int]:
    """Run a program that renders something and prints what ``code`` does; the numbers printed."""
    made = (
        "import os, sys\n"
        "from inferneo_jax.text.chat_template import ChatTemplate\n"
        "from inferneo_jax.text.template_pool import POOL\n"
        "def render():\n"
        "    return ChatTemplate('{{ 40 + 2 }}', {}).render([{}], add_generation_prompt=True, "
        "continue_final_message=False, variables={})\n"
        f"print(render(), *POOL.pids(), flush=True)\n{code}\n{end}\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", made],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (run.returncode, run.stderr) == (0, "")
    return [int(word) for word in run.stdout.split()]


@pytest.mark.parametrize("end", ["", "sys.exit()", "os._exit(0)"])
def test_workers_end_with_the_process_that_uses_them(end):
    answer, *pids = script("", end)
    assert answer == 42
    assert len(pids) == 2
    until(lambda: not any(is_there(pid) for pid in pids), 30)


def test_a_forked_process_has_workers_of_its_own():
    code = (
        "child = os.fork()\n"
        "print(render(), *POOL.pids(), flush=True)\n"
        "if child: os.waitpid(child, 0)"
    )
    numbers = script(code, "")
    assert numbers.count(42) == 3
    assert len(set(numbers)) == 5, "two workers of either process"
