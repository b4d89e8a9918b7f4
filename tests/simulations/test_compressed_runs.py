"""Compressed federations on the in-process engine: the same bits twice, and residuals that follow what counted."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from flwr.app import MessageType
from torch import Tensor

from client import app as app_module
from client.contract import Update
from client.encoding import Compression
from client.feedback import Packed, pack
from medsegdiff.weights import hash_weights, load_model
from server.journal import Journal
from server.rounds import traffic
from tests.fake_sites import on, say
from tests.watched_sites import Sites

KINDS = [Compression("bf16"), Compression("int8"), Compression("top_k", 0.1)]


@pytest.mark.slow
@pytest.mark.parametrize("compression", KINDS, ids=str)
def test_the_same_bits_twice(carry_out, tmp_path, compression) -> None:
    """Also when the run was killed in its second round; the report counts what travelled."""
    first = carry_out("one", {"compression": compression})
    carry_out("two", {"compression": compression})
    killed = Sites()
    killed.dies_at = 5  # three sites: in the second round, when two have answered
    with pytest.raises(KeyboardInterrupt):
        carry_out("killed", {"compression": compression}, killed)
    carry_out("killed", {"compression": compression})
    models = [(tmp_path / "runs" / name / "model.safetensors").read_bytes() for name in ("one", "two", "killed")]
    assert models[0] == models[1] == models[2]
    moved = traffic(Journal(tmp_path / "runs" / "one" / "journal.jsonl").events)
    assert moved["up"] == first.bytes
    plain = carry_out("plain", {"compression": Compression()})
    assert moved["up"] < plain.bytes / {"bf16": 2.5, "int8": 3, "top_k": 15}[compression.kind]
    other = load_model(tmp_path / "runs" / "plain" / "model.safetensors").network.state_dict()
    mine = load_model(tmp_path / "runs" / "one" / "model.safetensors").network.state_dict()
    assert hash_weights(other) != hash_weights(mine)


@pytest.mark.slow
@pytest.mark.parametrize("compression", [Compression("int8"), Compression("top_k", 0.1)], ids=str)
def test_a_residual_advances_with_what_counted(carry_out, tmp_path, monkeypatch, compression) -> None:
    """Birch's second update is rejected: its third begins with what its first one left. All else goes on as it was."""
    seen: dict[str, list[tuple[str, str]]] = defaultdict(list)  # site -> hash of what was fed back, of what was left

    def watching(update: Update, delta: object, kind: Compression, residual: dict[str, Tensor] | None = None) -> Packed:
        packed = pack(update, delta, kind, residual)  # type: ignore[arg-type]
        whole = {name: value + (residual or {}).get(name, 0) for name, value in delta.items()}  # type: ignore[attr-defined]
        for name, value in whole.items():
            assert torch.allclose(packed.sent[name] + packed.residual[name], value, rtol=0, atol=1e-9)
        seen[update.site].append((hash_weights(residual or {}), hash_weights(packed.residual)))
        return packed

    monkeypatch.setattr(app_module, "pack", watching)
    spoil = on(MessageType.TRAIN, say(patients=10**6))
    carry_out("one", {"compression": compression}, Sites({(2, "birch"): spoil}), quorum=2)
    events = [e for e in Journal(tmp_path / "runs" / "one" / "journal.jsonl").events if e["event"] == "round"]
    assert [sorted(event.get("rejected", {})) for event in events] == [[], [], ["birch"], []]
    for site, rounds in seen.items():
        fed = [round_[0] for round_ in rounds]
        left_by = [round_[1] for round_ in rounds]
        assert fed[0] == hash_weights({})
        assert fed[1] == left_by[0] != fed[0]
        assert fed[2] == (left_by[0] if site == "birch" else left_by[1])
    assert not list((tmp_path / "world-one").glob("*/residuals/*"))  # the run is over


def test_without_feedback_nothing_is_named_or_kept(carry_out, tmp_path) -> None:
    """bf16 leaves no residual behind, and no assignment names updates."""
    carry_out("one", {"compression": Compression("bf16")})
    events = Journal(tmp_path / "runs" / "one" / "journal.jsonl").events
    assert not [event for event in events if "counted" in event]
    assert not list((tmp_path / "world-one").glob("*/residuals"))


def test_privacy_and_feedback_exclude_each_other_at_the_site_too(tiny_task) -> None:
    """A server whose table was changed cannot ask for both."""
    from client.contract import PrivacyTask

    for compression in (Compression("int8"), Compression("top_k", 0.1)):
        with pytest.raises(ValueError, match="feeds back what it leaves out"):
            replace(tiny_task, compression=compression, privacy=PrivacyTask())
    assert replace(tiny_task, compression=Compression("bf16"), privacy=PrivacyTask()).privacy is not None
