"""The supervisor, with real children: small Python processes that crash, hang, fork and refuse to die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy import guard, supervisor
from deploy.child import Backoff, Child
from deploy.supervisor import Supervisor, hold, read_status
from medsegdiff.errors import UserError

ROOT = Path(supervisor.__file__).parent.parent
SLEEP = "import time; time.sleep(600)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open({0!r}, 'w').close(); time.sleep(600)"
)

pytestmark = pytest.mark.e2e


def python(code: str) -> tuple[str, ...]:
    """The command that runs a line of Python, without the wait for site-packages."""
    return (sys.executable, "-I", "-S", "-c", code)


def forks(stubborn: bool, pids: Path) -> str:
    """Code of a process with a child of its own that leaves its process group, and perhaps ignores SIGTERM."""
    ignore = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" if stubborn else ""
    return (
        "import os, time\n"
        "if os.fork() == 0:\n"
        f"    os.setpgid(0, 0); {ignore} open({str(pids)!r}, 'a').write(f'{{os.getpid()}}\\n')\n"
        "time.sleep(600)"
    )


def until(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    """Wait for something to become true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)
    return found


def alive(pid: int) -> bool:
    process = guard.read_process(pid)
    return process is not None and process.state != "Z"


def read_pids(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().split()] if path.exists() else []


class Team:
    """A supervisor in this process, and what it reported."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.supervisor: Supervisor

    def start(self, *children: Child, first: float = 0.05) -> Supervisor:
        self.supervisor = Supervisor(
            children,
            lambda event, facts: self.events.append((event, facts)),
            state=self.state,
            backoff=lambda: Backoff(first, 0.4, chance=lambda: 0.0),
        )
        self.supervisor.start()
        return self.supervisor

    def told(self, event: str, child: str | None = None) -> list[dict[str, Any]]:
        return [facts for name, facts in self.events if name == event and child in (None, facts.get("child"))]

    def pid(self, name: str) -> int:
        return int(until(lambda: self.supervisor.status()[name]["pid"]))


@pytest.fixture
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Team]:
    monkeypatch.setattr(supervisor, "TICK_SECONDS", 0.02)
    monkeypatch.setattr(supervisor, "READY_SECONDS", 0.02)
    monkeypatch.setattr(supervisor, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(supervisor, "SCAN_SECONDS", 0.05)
    team = Team(tmp_path / "state")
    yield team
    team.supervisor.stop()
    assert guard.recorded(json.loads((team.state / "supervisor.json").read_text()), just_now=False) == []


def test_a_crash_loop_backs_off(team: Team, tmp_path: Path) -> None:
    """A child that ends at once is started again after growing pauses, and its exit code is told."""
    team.start(
        Child(name="crash", command=python("import sys; print('went'); sys.exit(3)"), log=tmp_path / "crash.log")
    )
    until(lambda: len(team.told("restarting")) >= 5)
    assert [facts["seconds"] for facts in team.told("restarting")[:5]] == [0.1, 0.1, 0.2, 0.4, 0.4]  # 0.05 rounds up
    assert {facts["how"] for facts in team.told("exited")} == {"exit code 3"}
    assert (tmp_path / "crash.log").read_text().count("went") >= 5
    assert team.supervisor.status()["crash"]["restarts"] >= 4
    assert (tmp_path / "crash.log").stat().st_mode & 0o777 == 0o600


def test_a_command_that_is_not_there_is_tried_again(team: Team, tmp_path: Path) -> None:
    """A missing program, or a missing folder, is a reason to wait, not to give up; the log says what is missing."""
    nowhere = Child(name="nowhere", command=("/no/such/program",), log=tmp_path / "a.log")
    homeless = Child(name="homeless", command=python(SLEEP), log=tmp_path / "b.log", cwd=tmp_path / "no")
    team.start(nowhere, homeless)
    until(lambda: len(team.told("restarting", "nowhere")) > 1 and len(team.told("restarting", "homeless")) > 1)
    assert "/no/such/program: cannot be started (No such file or directory)" in (tmp_path / "a.log").read_text()
    assert team.told("exited", "nowhere")[0]["how"] == "exit code 127"
    assert "could not be started" in team.told("exited", "homeless")[0]["how"]
    (tmp_path / "no").mkdir()
    until(lambda: team.told("ready", "homeless"))


@pytest.mark.parametrize("answer", ["no", "raises", "never"])
def test_a_hang_is_seen_by_the_health_check(
    team: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    """A living child that does not answer three times is ended and started again; other children stay as they are."""
    monkeypatch.setattr("deploy.child.CHECK_SECONDS", 0.05)
    release = tmp_path / "release"

    def health() -> bool:
        if answer == "raises":
            raise OSError("refused")
        while answer == "never" and not release.exists():
            time.sleep(0.02)
        return False

    sick = Child(name="sick", command=python(SLEEP), log=tmp_path / "s.log", health=health, health_seconds=0.02)
    well = Child(name="well", command=python(SLEEP), log=tmp_path / "w.log", health=lambda: True, health_seconds=0.02)
    team.start(sick, well)
    until(lambda: team.told("started", "sick")[1:])
    release.touch()
    assert [facts["failures"] for facts in team.told("unhealthy", "sick")][:3] == [1, 2, 3]
    assert "no answer 3 times" in team.told("ending", "sick")[0]["reason"]
    assert team.told("exited", "sick")[0]["how"] == "signal 15, Terminated"
    assert len(team.told("started", "well")) == 1
    assert team.supervisor.status()["well"]["healthy"]


def test_one_answer_in_between_is_health(team: Team, tmp_path: Path) -> None:
    """Failures count in a row only."""
    answers = [False, False, True] * 6
    told: list[bool] = []
    flaky = Child(
        name="flaky", command=python(SLEEP), log=tmp_path / "f.log", health_seconds=0.01,
        health=lambda: told.append(answers[len(told) % len(answers)]) or told[-1],
    )  # fmt: skip
    team.start(flaky)
    until(lambda: len(told) >= 12)
    assert len(team.told("started")) == 1
    assert {facts["failures"] for facts in team.told("unhealthy")} == {1, 2}


def test_a_child_that_never_gets_ready_is_started_again(team: Team, tmp_path: Path) -> None:
    """To start and never be ready is a hang, too."""
    team.start(
        Child(name="slow", command=python(SLEEP), log=tmp_path / "s.log", ready=lambda: False, start_seconds=0.2),
        Child(name="next", command=python(SLEEP), log=tmp_path / "n.log", after=("slow",)),
    )
    until(lambda: team.told("started", "slow")[1:])
    assert team.told("ending", "slow")[0]["reason"] == "not ready after 0.2 s"
    assert not team.told("started", "next"), "what comes after it must wait"


def test_grandchildren_die(team: Team, tmp_path: Path) -> None:
    """Those of a child that crashed go before it is started again, those of a child that is stopped go with it."""
    pids = tmp_path / "pids"
    team.start(Child(name="parent", command=python(forks(True, pids)), log=tmp_path / "p.log", grace_seconds=0.2))
    (first,) = until(lambda: read_pids(pids))
    os.kill(team.pid("parent"), signal.SIGKILL)
    _, second = until(lambda: len(found := read_pids(pids)) == 2 and found)
    assert not alive(first), "started again while a part of it was still there"
    assert team.told("exited")[0]["how"] == "signal 9, Killed"
    team.supervisor.stop()
    assert not alive(second)


def test_a_child_that_ignores_the_polite_signal_is_killed(team: Team, tmp_path: Path) -> None:
    """SIGTERM, the grace, SIGKILL."""
    team.start(
        Child(name="mule", command=python(STUBBORN.format(str(tmp_path / "up"))), log=tmp_path / "m", grace_seconds=0.3)
    )
    until((tmp_path / "up").exists)
    begun = time.monotonic()
    team.supervisor.stop()
    assert 0.3 <= time.monotonic() - begun < 3
    assert team.told("exited")[0]["how"] == "signal 9, Killed"


def test_memory_beyond_the_limit_ends_a_child(team: Team, tmp_path: Path) -> None:
    """A child that grows past its limit is started anew before the machine is short of memory."""
    hog = "import time; x = bytearray(b'x' * 100_000_000); time.sleep(600)"
    team.start(
        Child(name="hog", command=python(hog), log=tmp_path / "h.log", memory_mib=60),
        Child(name="thin", command=python(SLEEP), log=tmp_path / "t.log", memory_mib=60),
    )
    until(lambda: team.told("started", "hog")[1:])
    assert "MiB of memory, limit 60" in team.told("ending", "hog")[0]["reason"]
    assert len(team.told("started", "thin")) == 1


def test_order_of_start_and_stop(team: Team, tmp_path: Path) -> None:
    """Each is started when those before it are ready, and ended before them."""
    gate = tmp_path / "gate"
    team.start(
        Child(name="link", command=python(SLEEP), log=tmp_path / "a", ready=gate.exists),
        Child(name="exec", command=python(SLEEP), log=tmp_path / "b", after=("link",)),
        Child(
            name="gateway", command=python(SLEEP), log=tmp_path / "c", after=("link", "exec"), restart_with=("link",)
        ),
    )
    until(lambda: team.told("started", "link"))
    time.sleep(0.2)
    assert len(team.told("started")) == 1
    gate.touch()
    until(lambda: team.told("ready", "gateway"))
    team.supervisor.stop()
    assert {facts["reason"] for facts in team.told("ending")} == {"stopping"}
    assert [facts["child"] for facts in team.told("ready")] == ["link", "exec", "gateway"]
    assert [facts["child"] for facts in team.told("exited")] == ["gateway", "exec", "link"]
    assert [facts["child"] for facts in team.told("stopped")] == ["gateway", "exec", "link"]


def test_companions_restart_together(team: Team, tmp_path: Path) -> None:
    """Who does not survive another's end is started anew with it, without a pause of its own, and after it."""
    node = Child(name="node", command=python(SLEEP), log=tmp_path / "n", restart_with=("runner",))
    runner = Child(name="runner", command=python(SLEEP), log=tmp_path / "r", after=("node",))
    other = Child(name="other", command=python(SLEEP), log=tmp_path / "o", after=("node",))
    team.start(node, runner, other)
    until(lambda: team.told("ready", "other"))
    before = team.pid("runner")
    os.kill(team.pid("node"), signal.SIGKILL)
    until(lambda: team.told("ready", "runner")[1:])
    assert team.pid("runner") != before
    assert team.told("ending", "runner")[0]["reason"] == "node ended"
    assert [facts["seconds"] for facts in team.told("restarting", "runner")] == [0.0]
    starts = [facts["child"] for facts in team.told("started")]
    assert starts == ["node", "runner", "other", "node", "runner"]


def test_a_restart_that_was_asked_for_has_no_pause(team: Team, tmp_path: Path) -> None:
    """As after a renewed certificate."""
    team.start(Child(name="node", command=python(SLEEP), log=tmp_path / "n"))
    before = team.pid("node")
    team.supervisor.restart("node", "new certificate")
    until(lambda: team.told("started")[1:])
    assert team.pid("node") != before
    assert team.told("ending")[0]["reason"] == "new certificate"
    assert team.told("restarting")[0]["seconds"] == 0
    with pytest.raises(KeyError):
        team.supervisor.restart("nobody", "")


def test_listeners_that_fail_and_a_full_disk_do_not_end_the_supervision(
    team: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Children go on without their state file, and one trouble is told once."""

    def full(path: Path, data: bytes, mode: int = 0o666) -> None:
        raise UserError("no space")

    def listen(event: str, facts: dict[str, Any]) -> None:
        team.events.append((event, facts))
        raise RuntimeError("a listener with a defect")

    team.supervisor = Supervisor(
        [Child(name="one", command=python("import time; time.sleep(0.05)"), log=tmp_path / "o")],
        listen, state=team.state, backoff=lambda: Backoff(0.05, 0.05),
    )  # fmt: skip
    team.supervisor.start()
    until(lambda: team.told("started")[1:])
    with monkeypatch.context() as patch:
        patch.setattr(supervisor, "write_atomic", full)
        until(lambda: team.told("started")[4:])
        assert [facts["what"] for facts in team.told("trouble")] == ["no space"]
    until(lambda: (read_status(team.state) or {})["children"]["one"]["restarts"] >= 4)


def test_until_when_a_supervisor_lived_can_be_seen(team: Team, tmp_path: Path) -> None:
    """Its file is touched while it lives, though nothing in it changes."""
    team.start(Child(name="one", command=python(SLEEP), log=tmp_path / "one.log"))
    until(lambda: team.told("ready", "one"))
    path = team.state / "supervisor.json"
    time.sleep(0.3)
    os.utime(path, (1, 1))
    until(lambda: path.stat().st_mtime > 1)


def test_other_processes_see_what_runs(team: Team, tmp_path: Path) -> None:
    """The state file names each child, is private, and counts as nothing once its writer is gone."""
    team.start(Child(name="one", command=python(SLEEP), log=tmp_path / "o"))
    until(lambda: team.told("ready"))
    found = until(lambda: (read_status(team.state) or {}).get("children", {}).get("one", {}).get("pid"))
    assert found == team.pid("one")
    assert (team.state / "supervisor.json").stat().st_mode & 0o777 == 0o600
    record = json.loads((team.state / "supervisor.json").read_text())
    assert record["children"]["one"]["phase"] == "running"
    for other in ({"start": record["start"] + 1}, {"boot": "another"}, {"pid": None}):
        (tmp_path / "supervisor.json").write_text(json.dumps(record | other))
        assert read_status(tmp_path) is None
    assert read_status(tmp_path / "no") is None
    for damaged in ("{torn", "[]", json.dumps(record | {"children": [1]}), json.dumps(record | {"children": {"a": 1}})):
        (tmp_path / "supervisor.json").write_text(damaged)
        assert read_status(tmp_path) is None
    team.supervisor.stop()
    (team.state / "supervisor.json").write_text(json.dumps(record | {"children": {"a": 1}}))
    again = Supervisor((), lambda *_: None, state=team.state)
    again.start()
    again.stop()


def test_logs_stay_bounded(team: Team, tmp_path: Path) -> None:
    """A child that writes without end neither fills the disk nor is blocked, nor is what it wrote last lost."""
    chatter = "import itertools\nfor n in itertools.count(): print(f'{n:099d}', flush=n % 100 == 0)"
    log = tmp_path / "c.log"
    team.start(Child(name="chatter", command=python(chatter), log=log, log_mib=0.5))
    until((tmp_path / "c.log.3").exists, 20)
    team.supervisor.stop()
    assert {path.name for path in tmp_path.glob("c.log*")} == {"c.log", "c.log.1", "c.log.2", "c.log.3"}
    assert len(team.told("started")) == 1
    assert int((tmp_path / "c.log.1").read_text().split()[-2]) > 15_000


def test_wrong_lists_of_children_are_refused(tmp_path: Path) -> None:
    """A name that is not there, or twice, is a defect of the caller."""
    one = Child(name="one", command=("x",), log=tmp_path / "o")
    for bad in (
        [one, one],
        [Child(name="a", command=("x",), log=tmp_path / "a", after=("one",)), one],
        [Child(name="a", command=("x",), log=tmp_path / "a", restart_with=("b",))],
    ):
        with pytest.raises(ValueError, match="child"):
            Supervisor(bad, print, state=tmp_path)


def test_one_supervisor_a_folder(team: Team, tmp_path: Path) -> None:
    """A second start names the process that runs, and changes nothing; a lock file alone holds nobody back."""
    team.state.mkdir()
    (team.state / "lock").write_text("99999999\n")
    team.start(Child(name="one", command=python(SLEEP), log=tmp_path / "o"))
    pid = team.pid("one")
    with pytest.raises(UserError, match=f"process {os.getpid()} runs here already"), hold(team.state / "lock"):
        pass
    assert alive(pid)
    team.supervisor.stop()
    with hold(team.state / "lock"):
        assert (team.state / "lock").read_text() == f"{os.getpid()}\n"


SERVER = """
import signal, sys
for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # whatever the tests were started with: a shell's & ignores
    signal.signal(name, signal.SIG_IGN if name in {ignored!r} else signal.SIG_DFL)
from pathlib import Path
sys.path.insert(0, {root!r})
from deploy import supervisor
from deploy.supervisor import Child, Supervisor
supervisor.SCAN_SECONDS = 0.1
folder = Path({folder!r})
children = [
    Child(name=name, command=command, log=folder / name, grace_seconds={grace}) for name, command in {commands!r}
]
Supervisor(children, lambda event, facts: print(event, facts, flush=True), state=folder / "state").run()
print("ended", flush=True)
"""


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Start]:
    """Start a supervisor as a process of its own, in the test's folder; whatever goes wrong, nobody is left."""
    started = []

    def start(
        *commands: tuple[str, tuple[str, ...]], grace: float = 5.0, ignored: tuple[int, ...] = ()
    ) -> subprocess.Popen[str]:
        code = SERVER.format(
            root=str(ROOT), folder=str(tmp_path), commands=list(commands), grace=grace, ignored=ignored
        )
        started.append(
            subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
        )
        return started[-1]

    yield start
    record = tmp_path / "state" / "supervisor.json"
    left = json.loads(record.read_text()) if record.exists() else {}
    for process in started:
        process.kill()
        process.communicate()
    guard.end(left, grace=0, just_now=True)


def family(folder: Path, size: int) -> list[int]:
    """Everyone whom the supervisor of `folder` looks after, once there are `size` of them."""

    def members() -> list[int]:
        children = (read_status(folder / "state") or {"children": {}})["children"].values()
        return [p.pid for child in children if child["pid"] for p in guard.session_members(child["pid"])]

    return list(until(lambda: len(found := members()) == size and found))


@pytest.mark.parametrize("blow", ["supervisor", "supervisor and watch"])
def test_killed_supervisor(tmp_path: Path, start_server: Start, blow: str) -> None:
    """kill -9 takes along the children, at once, and their stubborn grandchildren; or the next start ends those."""
    pids = tmp_path / "pids"
    server = start_server(("a", python(SLEEP)), ("b", python(forks(True, pids))))
    everyone = family(tmp_path, 3)
    (grandchild,) = until(lambda: read_pids(pids))
    record = tmp_path / "state" / "supervisor.json"
    until(lambda: f"{grandchild}," in record.read_text())
    watches = [p.pid for p in guard.processes() if p.parent == server.pid and p.pid not in everyone]
    assert len(watches) == 1
    try:
        if blow != "supervisor":
            os.kill(watches[0], signal.SIGSTOP)  # killed, it would be started again
        server.kill()
        server.wait()
        until(lambda: [pid for pid in everyone if alive(pid)] in ([], [grandchild]), 2)
    finally:
        if blow != "supervisor":
            os.kill(watches[0], signal.SIGKILL)
    if blow != "supervisor":
        assert alive(grandchild)
        again = start_server(("a", python(SLEEP)))
        family(tmp_path, 1)
        again.terminate()
        told = again.communicate(timeout=10)[0]
        assert f"stale_ended {{'child': None, 'pid': {grandchild}}}" in told
        assert "predecessor_killed {'child': None, 'last_seen': '20" in told
    until(lambda: not alive(grandchild), 6)
    until(lambda: not alive(watches[0]), 6)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_everything(tmp_path: Path, start_server: Start, number: signal.Signals) -> None:
    """The usual ways to end a process end the children, in reverse order, and leave nobody."""
    server = start_server(("a", python(SLEEP)), ("b", python(SLEEP)))
    everyone = family(tmp_path, 2)
    watches = [p.pid for p in guard.processes() if p.parent == server.pid and p.pid not in everyone]
    server.send_signal(number)
    out, _ = server.communicate(timeout=10)
    assert server.returncode == 0
    assert out.splitlines()[-1] == "ended"
    assert out.index("stopped {'child': 'b'}") < out.index("stopped {'child': 'a'}")
    assert not any(alive(pid) for pid in [*everyone, *watches])
    assert read_status(tmp_path / "state") is None


def test_a_signal_that_was_ignored_stays_so(tmp_path: Path, start_server: Start) -> None:
    """Under nohup, or behind a shell's &: the terminal's end and its Ctrl-C go past; SIGTERM still ends all."""
    server = start_server(("a", python(SLEEP)), ignored=(int(signal.SIGHUP), int(signal.SIGINT)))
    (child,) = family(tmp_path, 1)
    for number in (signal.SIGHUP, signal.SIGINT):
        server.send_signal(number)
    time.sleep(0.5)
    assert server.poll() is None
    assert alive(child)
    server.terminate()
    assert "ended" in server.communicate(timeout=10)[0]
    assert not alive(child)


def test_a_second_signal_leaves_out_the_grace(tmp_path: Path, start_server: Start) -> None:
    """Ctrl-C twice: a child that ignores the first is not waited for."""
    server = start_server(("mule", python(STUBBORN.format(str(tmp_path / "up")))), grace=60)
    until((tmp_path / "up").exists)
    server.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        server.wait(0.5)
    server.send_signal(signal.SIGINT)
    server.communicate(timeout=5)
    assert server.returncode == 0


def test_strangers_with_a_recycled_number_live(tmp_path: Path) -> None:
    """The record of an earlier life may name numbers that now belong to others: only number and start time count."""
    stranger = subprocess.Popen(python(SLEEP), start_new_session=True)
    ours = subprocess.Popen(python(SLEEP), start_new_session=True)
    try:
        strange, own = (guard.read_process(process.pid) for process in (stranger, ours))
        assert strange
        assert own
        gone = {"pid": 2**22 + 1, "start": 1}

        def record(child: dict[str, Any], boot: str = guard.boot()) -> dict[str, Any]:
            return {"boot": boot, "pid": 1, "start": 0, "children": {"x": child}}

        for harmless in (
            record({"pid": strange.pid, "start": strange.start - 1, "members": []}),
            record({"pid": strange.pid, "start": strange.start, "members": []}, boot="an earlier boot"),
            record(gone | {"members": [[strange.pid, strange.start - 1]]}),
            record({"pid": None}), {}, {"boot": guard.boot()},
        ):  # fmt: skip
            assert guard.end(harmless) == []
        assert stranger.poll() is None
        guard.send(strange._replace(start=strange.start + 1), signal.SIGKILL)
        time.sleep(0.05)
        assert stranger.poll() is None

        (ended,) = guard.end(record(gone | {"members": [[own.pid, own.start]]}), grace=1)
        assert ended.pid == own.pid
        assert ours.wait(5) == -signal.SIGTERM
        (ended,) = guard.end(record({"pid": strange.pid, "start": strange.start, "members": []}), grace=1)
        assert ended.pid == strange.pid
    finally:
        for process in (stranger, ours):
            process.kill()
            process.wait()


def test_a_name_with_blanks_and_brackets_does_not_confuse(tmp_path: Path) -> None:
    """/proc/PID/stat holds the program's name as it is."""
    odd = tmp_path / "a) Z 1 (b"
    odd.symlink_to(sys.executable)
    process = subprocess.Popen([odd, "-I", "-S", "-c", SLEEP], start_new_session=True)
    try:
        found = until(lambda: (p := guard.read_process(process.pid)) and p.session == process.pid and p)
        assert (found.pid, found.parent) == (process.pid, os.getpid())
        assert found.state in "RSD"
    finally:
        process.kill()
        process.wait()
    assert guard.read_process(process.pid) is None
