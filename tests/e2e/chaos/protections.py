"""Each protection taken out, and the test that has to notice: python -m tests.e2e.chaos.protections

A test of a fault proves something only if it fails without what protects from the fault. So each protection below is
one exact text of the program; it is replaced in a copy of the tree, and the named tests run against the copy: they must
go red. `--end-to-end` adds those whose fault takes a federation of real processes, some minutes each.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from medsegdiff.errors import EXIT_CODE, UserError
from medsegdiff.files import write_atomic

ROOT = Path(__file__).parents[3]
PARTS = ("client", "server", "deploy", "simulations", "medsegdiff", "benchmarks", "tests", "docs", "pyproject.toml")
LONGEST_SECONDS = 1500.0  # of one protection's tests: a run that never ends is red, too


@dataclass(frozen=True)
class Protection:
    """One thing that protects from a fault."""

    fault: str
    what: str
    file: str
    text: str  # stands in the file exactly once
    without: str
    tests: tuple[str, ...]  # pytest's names; at least one must fail
    end_to_end: bool = False


PROTECTIONS = (
    Protection(
        "any process killed",
        "the supervisor starts it again",
        "deploy/supervisor.py",
        "life.due = now + pause",
        "life.due = float('inf')",
        ("tests/deploy/test_supervisor.py::test_a_crash_loop_backs_off",),
    ),
    Protection(
        "ServerApp killed",
        "the keeper misses its process and starts the run anew",
        "deploy/keeper.py",
        "if not going_on or not self._serverapp_gone(found.status):",
        "if True:",
        ("tests/deploy/test_keeper.py::test_a_serverapp_whose_process_is_gone_is_noticed_at_once",),
    ),
    Protection(
        "SuperLink killed",
        "the keeper registers the sites at the new one",
        "deploy/keeper.py",
        "added, removed = self._control.register(admitted)",
        "added, removed = [], []  # type: ignore[var-annotated]",
        ("tests/deploy/test_keeper.py::test_a_superlink_without_its_memory_is_told_everything_anew",),
    ),
    Protection(
        "ServerApp that dies of itself",
        "pauses that grow, so that a broken run does not spin",
        "deploy/keeper.py",
        "self._pause = min(LONGEST_SECONDS, 2 * self._pause)",
        "pass",
        ("tests/deploy/test_keeper.py::test_a_dead_serverapp_is_started_again_with_growing_pauses",),
    ),
    Protection(
        "line that breaks before an answer is through",
        "a message that is not confirmed is given again",
        "deploy/object_guard.py",
        "_take_back(state, again)",
        "pass",
        ("tests/deploy/test_lost_answers.py::test_a_lost_question_and_a_lost_confirmation_cost_no_restart",),
    ),
    Protection(
        "line that breaks before a confirmation is answered",
        "a repeated confirmation is as good as the first",
        "deploy/object_guard.py",
        "if repeated:",
        "if False:",
        ("tests/deploy/test_lost_answers.py::test_a_lost_question_and_a_lost_confirmation_cost_no_restart",),
    ),
    Protection(
        "SuperNode killed",
        "its successor signs it off, and need not wait for Flower's lease",
        "client/supernode.py",
        'super().DeactivateNode(DeactivateNodeRequest(node_id=int(place.read_text(encoding="ascii"))))',
        "pass",
        ("tests/client/test_supernode.py::test_the_successor_of_a_killed_supernode_is_let_in_at_once",),
    ),
    Protection(
        "SuperNode that gave up",
        "its process ends, so that the supervisor starts it anew",
        "client/supernode.py",
        '    os._exit(1)\n',
        "    threading.Event().wait()\n",
        ("tests/client/test_supernode.py::test_a_supernode_that_gave_up_ends",),
    ),
    Protection(
        "machine rebooted",
        "systemd starts both ends whenever they end",
        "deploy/files/systemd/medsegfed-site.service",
        "Restart=always",
        "Restart=no",
        ("tests/deploy/test_deployment_files.py",),
    ),
    Protection(
        "runner or line dies after a training",
        "the outbox answers a repeated question",
        "client/guard.py",
        "found = self.outbox.find(assignment, task)",
        "found = None",
        ("tests/client/test_guard.py::test_a_repeated_question_gets_the_same_bytes_without_training",),
    ),
    Protection(
        "server goes back to an earlier checkpoint",
        "the outbox keeps the last two committed rounds",
        "client/guard.py",
        "self.outbox.forget(run, round_ - REPEATABLE)",
        "self.outbox.forget(run, round_)",
        ("tests/client/test_guard.py::test_scoring_keeps_what_the_server_may_have_to_ask_for_again",),
    ),
    Protection(
        "server restored from a backup",
        "no round is trained from a second model",
        "client/guard.py",
        "if before not in (None, assignment.model_hash):",
        "if False:",
        ("tests/client/test_guard.py::test_a_round_is_not_trained_from_a_second_model",),
    ),
    Protection(
        "checkpoint bit-flipped",
        "weights are compared with their hash",
        "server/checkpoints.py",
        'if metadata.get("hash") != hash_weights(weights):',
        "if False:",
        ("tests/server/test_checkpoints.py::test_any_flipped_bit_sends_back_to_the_round_before",),
    ),
    Protection(
        "checkpoint's record changed",
        "a seal over run, round, record and hashes",
        "server/checkpoints.py",
        'sealed = metadata.pop("seal", None) == _seal(metadata)',
        'sealed = metadata.pop("seal", None) is not None',
        ("tests/server/test_checkpoints.py::test_any_flipped_bit_sends_back_to_the_round_before",),
    ),
    Protection(
        "checkpoint torn",
        "it is passed over, and the one before is used",
        "server/checkpoints.py",
        'log.warning("%s The round before it is used.", error)',
        "raise",
        ("tests/server/test_checkpoints.py::test_a_torn_file_sends_back_to_the_round_before",),
    ),
    Protection(
        "round repeated after damage",
        "the same sites make it again, whoever else has come since",
        "server/strategy.py",
        "if before and site not in before:",
        "if False:",
        ("tests/server/test_strategy.py::test_a_repeated_round_is_made_by_the_same_sites",),
    ),
    Protection(
        "round that comes out otherwise",
        "it is not committed a second time",
        "server/strategy.py",
        'if before is not None and before["model_hash"] != record["model_hash"]:',
        "if False:",
        ("tests/server/test_strategy.py::test_a_repeated_round_that_comes_out_otherwise_is_not_committed",),
    ),
    Protection(
        "journal torn",
        "its torn tail is cut off",
        "server/journal.py",
        "if good < len(raw):",
        "if False:",
        ("tests/server/test_journal.py::test_a_torn_tail_is_cut_and_the_rest_kept",),
    ),
    Protection(
        "journal changed",
        "a line that is none stops the reading",
        "server/journal.py",
        "if number == len(whole) and not tail:",
        "if True:",
        ("tests/server/test_journal.py::test_damage_in_the_middle_is_refused",),
    ),
    Protection(
        "audit log bit-flipped",
        "every line is checked against its successor",
        "medsegdiff/chained_log.py",
        "entry = _parse(line, number, self.seen.head)",
        'entry = {"time": "", "event": "", **json.loads(line)}',
        ("tests/medsegdiff/test_chained_log.py::test_any_change_of_either_file_is_detected",),
    ),
    Protection(
        "audit log shortened",
        "the head file knows how many lines there are",
        "medsegdiff/chained_log.py",
        "if self.seen.lines < committed.count:",
        "if False:",
        (
            "tests/medsegdiff/test_chained_log.py::test_what_is_missing_or_added_is_told",
            "tests/medsegdiff/test_chained_log.py::test_any_change_of_either_file_is_detected",
        ),
    ),
    Protection(
        "server's disk full",
        "the run is interrupted and not failed, and goes on with space",
        "server/app.py",
        "if isinstance(error.__cause__, OSError):",
        "if False:",
        ("tests/server/test_full_disk.py::test_a_full_disk_interrupts_a_run_and_does_not_end_it",),
    ),
    Protection(
        "server's disk full, the round at hand",
        "a checkpoint that could not be written commits nothing",
        "medsegdiff/files.py",
        "            partial.unlink(missing_ok=True)\n        raise UserError(\n",
        "            partial.unlink(missing_ok=True)\n        if path.name.startswith('round-'):\n            return\n"
        "        raise UserError(\n",
        (
            "tests/server/test_checkpoints.py::test_a_full_disk_keeps_the_rounds_there_are",
            "tests/server/test_full_disk.py",
        ),
    ),
    Protection(
        "site's disk full",
        "nothing leaves that was not written down",
        "client/guard.py",
        "        self.outbox.keep(update, delta, content)\n",
        "        try:\n            self.outbox.keep(update, delta, content)\n"
        "        except UserError:\n            pass\n",
        (
            "tests/client/test_guard.py::test_a_full_disk_sends_nothing",
            "tests/client/test_guard.py::test_a_full_disk_sends_nothing_and_costs_no_second_training",
        ),
    ),
    Protection(
        "line cut",
        "a site whose line was lost is asked again in the same round",
        "server/exchange.py",
        "lost = reply.has_error() and reply.error.code in LOST",
        "lost = False",
        ("tests/server/test_exchange.py::test_a_lost_line_is_asked_again_and_counts_once",),
    ),
    Protection(
        "line silent in a handshake",
        "it is tried again; Flower would give up for good",
        "client/supernode.py",
        'raise httpx.ConnectError(f"the line broke ({type(error).__name__})") from error',
        "raise",
        ("tests/client/test_supernode.py::test_a_broken_line_is_tried_again_and_a_refused_certificate_is_not",),
    ),
    Protection(
        "line drips or breaks in an answer",
        "an answer that was lost has the node started anew",
        "client/supernode.py",
        "        if lost:\n",
        "        if False:\n",
        ("tests/client/test_supernode.py::test_a_lost_answer_ends_the_connection",),
    ),
    Protection(
        "below the quorum",
        "the run waits, says so, and goes on when sites return",
        "server/exchange.py",
        "if full() or not missing or (met() and (overdue or now - quiet_since > absence_seconds)):",
        "if full() or not missing or overdue or now - quiet_since > absence_seconds:",
        ("tests/server/test_exchange.py::test_below_the_quorum_the_run_says_so_and_goes_on_when_sites_return",),
    ),
    Protection(
        "site leaves for good",
        "it is waited for no longer than the absence allows",
        "server/exchange.py",
        "if full() or not missing or (met() and (overdue or now - quiet_since > absence_seconds)):",
        "if full() or not missing or (met() and overdue):",
        ("tests/server/test_exchange.py::test_with_the_quorum_an_absent_site_is_waited_for_no_longer_than_stated",),
    ),
    Protection(
        "site revoked mid-round",
        "members are looked at again when an answer comes",
        "server/exchange.py",
        "self.look_at_members()  # revoked since the last look: what arrives now does not count any more",
        "pass",
        ("tests/server/test_exchange.py::test_a_revoked_site_leaves_within_the_round",),
    ),
    Protection(
        "version N-1 at a site",
        "another contract version is told as such",
        "client/contract.py",
        "if isinstance(version, int) and version != CONTRACT_VERSION:",
        "if False:",
        (
            "tests/client/test_contract.py::test_another_contract_version_is_told_before_the_keys_it_brings",
            "tests/client/test_app.py",
        ),
    ),
    Protection(
        "certificate of 60 seconds",
        "it is renewed once two thirds of its time have passed",
        "deploy/renewal.py",
        "return days_left(certificate, now) < length.total_seconds() / 86_400 / 3",
        "return False",
        (
            "tests/deploy/test_renewal.py::test_a_certificate_of_a_minute_is_renewed",
            "tests/deploy/test_renewal.py::test_ninety_days_are_renewed_at_thirty",
        ),
    ),
    Protection(
        "privacy ledger put back",
        "a head that was noted elsewhere must be one of its lines",
        "client/privacy/account.py",
        "missing = noted - account.heads - {GENESIS}\n    if missing:",
        "missing = noted - account.heads - {GENESIS}\n    if False:",
        ("tests/client/privacy/test_ledger.py::test_a_rolled_back_pair_is_found_by_its_anchors",),
    ),
    Protection(
        "site restarted without a trace",
        "a node's activation tells that its process is another one",
        "server/exchange.py",
        "                and (node, False, activation) not in asked\n",
        "                and not any((node, False) == (other, new) for other, new, _ in asked)\n",
        ("tests/server/test_exchange.py::test_a_site_that_restarted_without_a_trace_is_asked_again",),
    ),
    Protection(
        "site that answers twice",
        "an update counts once, however many copies of its question are answered",
        "server/exchange.py",
        "if q.site != site or not round_state.asks(q)",
        "if True",
        ("tests/server/test_exchange.py::test_two_answers_to_one_round_count_once",),
    ),
    Protection(
        "processes killed, end to end",
        "the outbox answers a repeated question",
        "client/guard.py",
        "found = self.outbox.find(assignment, task)",
        "found = None",
        ("tests/e2e/chaos/test_kills.py::test_six_kills_lose_nothing",),
        end_to_end=True,
    ),
    Protection(
        "clock wrong by ten minutes, end to end",
        "a SuperNode that was turned down and ended is started anew until the clock is right",
        "deploy/supervisor.py",
        "life.due = now + pause",
        "life.due = float('inf')",
        ("tests/e2e/chaos/test_disks.py::test_a_clock_that_is_ten_minutes_wrong_costs_time_alone",),
        end_to_end=True,
    ),
    Protection(
        "site's disk full, end to end",
        "nothing leaves that was not written down",
        "client/guard.py",
        "        self.outbox.keep(update, delta, content)\n",
        "        try:\n            self.outbox.keep(update, delta, content)\n"
        "        except UserError:\n            pass\n",
        ("tests/e2e/chaos/test_disks.py",),
        end_to_end=True,
    ),
    Protection(
        "certificate of 60 seconds, end to end",
        "it is renewed once two thirds of its time have passed",
        "deploy/renewal.py",
        "return days_left(certificate, now) < length.total_seconds() / 86_400 / 3",
        "return False",
        ("tests/e2e/chaos/test_lines.py::test_a_certificate_of_a_minute_is_renewed_by_itself",),
        end_to_end=True,
    ),
)  # fmt: skip


def copy_without(protection: Protection, folder: Path) -> None:
    """A copy of the program in `folder` from which the protection was taken out.

    Raises:
        UserError: its text is not in its file exactly once: the program has moved on, and the entry has to follow.
    """
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__", "results"))
        else:
            shutil.copy(source, folder / part)
    file = folder / protection.file
    text = file.read_text()
    check_text(protection, text)
    file.write_text(text.replace(protection.text, protection.without))


def check_text(protection: Protection, text: str) -> None:
    """Raises UserError unless the protection's text stands in `text` exactly once."""
    if text.count(protection.text) != 1:
        raise UserError(
            f"{protection.file}: {protection.text!r} stands there {text.count(protection.text)} times, once is needed; "
            f"nothing was tried. Mend the entry '{protection.fault}' of {Path(__file__).name}."
        )


def goes_red(protection: Protection) -> tuple[bool, str]:
    """Whether a test fails without the protection, and pytest's closing line."""
    with TemporaryDirectory(prefix="medsegfed-") as scratch:
        folder = Path(scratch)
        copy_without(protection, folder)
        environment = os.environ | {"PYTHONPATH": str(folder)}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *protection.tests]
        if not protection.end_to_end:
            command += ["--timeout", "120"]
        try:
            done = subprocess.run(
                command,
                check=False,
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=LONGEST_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return True, f"no end within {LONGEST_SECONDS:.0f} s"
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    closing = lines[-1].strip("= ") if lines else done.stderr[-200:]
    return done.returncode == 1, closing  # 1: tests failed; others: none was found, or pytest itself broke


def main(arguments: Sequence[str] | None = None) -> int:
    """Try all; exit code 1 if a protection can be taken out unnoticed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--end-to-end", action="store_true", help="also those that take a federation of real processes")
    parser.add_argument("--only", help="those whose fault holds this text")
    parser.add_argument("--out", type=Path, help="write what was seen as JSON")
    asked = parser.parse_args(arguments)
    chosen = [p for p in PROTECTIONS if (asked.end_to_end or not p.end_to_end) and (asked.only or "") in p.fault]
    if not chosen:
        parser.error(f"--only {asked.only}: no fault holds this text, so nothing was tried")
    told = []
    for protection in chosen:
        started = time.monotonic()
        red, closing = goes_red(protection)
        seconds = time.monotonic() - started
        told.append({"fault": protection.fault, "without": protection.what, "red": red, "seen": closing})
        print(f"{'red  ' if red else 'GREEN'} {seconds:5.0f} s  {protection.fault}: {protection.what} ({closing})")
        sys.stdout.flush()
        if asked.out is not None:
            write_atomic(asked.out, json.dumps(told, indent=1).encode())
    unnoticed = [row["fault"] for row in told if not row["red"]]
    print(f"{len(told) - len(unnoticed)} of {len(told)} protections are missed by a test when they are taken out.")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_CODE)
