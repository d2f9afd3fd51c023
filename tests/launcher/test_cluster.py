"""What launchers of several machines say to each other and decide, without a machine."""

from __future__ import annotations

import json

import pytest

from samestep.launcher.cluster.layout import Timeouts, layout
from samestep.launcher.cluster.link import LONGEST_LINE, Link, LinkError
from samestep.launcher.cluster.roster import Candidate, choose
from samestep.launcher.config import LaunchConfig
from samestep.launcher.contract import UsageError

KEY = b"k" * 32


def talk(node: Link, head: Link) -> list[dict]:
    """Carry what is still to be sent until both are silent; what the head has heard."""
    heard = []
    while node.out or head.out:
        to_head, to_node = bytes(node.out), bytes(head.out)
        node.out.clear()
        head.out.clear()
        heard += head.feed(to_head)
        node.feed(to_node)
    return heard


def pair(node_key: bytes = KEY) -> tuple[Link, Link]:
    return Link(node_key, "node"), Link(KEY, "head")


def test_messages_arrive_in_order_whatever_is_cut_where():
    node, head = pair()
    for number in range(5):
        node.say({"number": number})
    node.feed(bytes(head.out))
    heard = [message for byte in bytes(node.out) for message in head.feed(bytes([byte]))]
    assert heard == [{"number": number} for number in range(5)]
    assert head.authenticated


def test_who_does_not_know_the_token_is_told_from_who_does():
    node, head = pair(b"x" * 32)
    node.say({"kind": "hello"})
    with pytest.raises(LinkError, match="another token"):
        talk(node, head)
    assert not head.authenticated


@pytest.mark.parametrize("tampered", ["changed", "repeated", "swapped", "left out"])
def test_no_line_can_be_changed_repeated_swapped_or_left_out(tampered):
    node, head = pair()
    talk(node, head)
    for number in range(3):
        node.say({"number": number})
    one, two, three = bytes(node.out).splitlines(keepends=True)
    lines = {
        "changed": [one.replace(b'"number":0', b'"number":9')],
        "repeated": [one, one],
        "swapped": [two, one],
        "left out": [one, three],
    }[tampered]
    with pytest.raises(LinkError):
        head.feed(b"".join(lines))


def test_a_line_of_another_conversation_is_worth_nothing():
    node, head = pair()
    talk(node, head)
    node.say({"kind": "hello"})
    line = bytes(node.out)
    other_node, other_head = pair()
    talk(other_node, other_head)
    with pytest.raises(LinkError):
        other_head.feed(line)


def test_a_line_can_not_be_sent_back_to_its_speaker():
    node, head = pair()
    talk(node, head)
    head.say({"kind": "stop"})
    with pytest.raises(LinkError):
        head.feed(bytes(head.out))


@pytest.mark.parametrize(
    "data",
    [
        *(b"GET / HTTP/1.1\r\n\n", b"{}\n", b'{"samestep": 2, "nonce": "x"}\n', b"[1]\n", b"\n"),
        b"[" * 100_000 + b"\n",
        b'{"samestep": 1, "nonce": "' + 32 * b"\\ud800" + b'"}\n',
    ],
    ids=["http", "nothing", "version", "list", "empty", "deep", "surrogates"],
)
def test_strangers_are_refused(data):
    with pytest.raises(LinkError):
        Link(KEY, "head").feed(data)


def test_nobody_can_fill_our_memory():
    with pytest.raises(LinkError, match="too long"):
        Link(KEY, "head").feed(b"x" * (LONGEST_LINE + 1))


def test_the_token_is_in_no_line():
    node, head = pair()
    node.say({"kind": "hello"})
    spoken = bytes(head.out)
    node.feed(spoken)
    assert KEY not in spoken + bytes(node.out)
    assert json.loads(spoken)["samestep"] == 1


@pytest.mark.parametrize(
    ("candidates", "room", "chosen"),
    [
        ([], 3, []),
        ([Candidate(None, "b"), Candidate(None, "a")], 3, [0, 1]),
        ([Candidate(2, "c"), Candidate(1, "b")], 3, [1, 0]),
        ([Candidate(None, "x"), Candidate(1, "b")], 3, [1, 0]),
        ([Candidate(None, "a"), Candidate(None, "b"), Candidate(None, "c")], 2, [0, 1]),
        ([Candidate(None, "a")], 0, []),
    ],
)
def test_ranks_follow_node_ranks_or_arrival(candidates, room, chosen):
    assert choose(candidates, room) == chosen


STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NODEID": "1"} | dict.fromkeys(
    ("SLURM_STEP_NUM_NODES", "SLURM_STEP_NUM_TASKS"), "3"
)


@pytest.mark.parametrize(
    ("options", "environ", "expected"),
    [
        ({}, {}, None),
        ({"nnodes": "1"}, {}, None),
        ({"nnodes": "1:1"}, {}, None),
        ({"nnodes": "2", "node_rank": 1}, {}, (2, 2, 1, "", 0)),
        ({"nnodes": "2", "node_rank": 0, "master_addr": "a", "master_port": 7}, {}, (2, 2, 0, "a", 7)),
        ({"nnodes": "1:4", "rdzv_endpoint": "h:5"}, {}, (1, 4, None, "h", 5)),
        ({"nnodes": "2", "rdzv_endpoint": "h"}, {}, (2, 2, None, "h", 29500)),
        ({"nnodes": "2", "rdzv_endpoint": "[fe80::1]:5"}, {}, (2, 2, None, "fe80::1", 5)),
        ({}, STEP, (3, 3, 1, "", 0)),
        ({"nnodes": "1:3"}, STEP, (1, 3, 1, "", 0)),
        ({"nnodes": "2"}, {"JOB_COMPLETION_INDEX": "1"}, (2, 2, 1, "", 0)),
    ],
)
def test_where_a_launcher_stands_among_machines(options, environ, expected):
    place = layout(LaunchConfig(**options), environ)
    assert (place and (place.fewest, place.most, place.node_rank, place.address, place.port)) == expected


@pytest.mark.parametrize(
    ("options", "environ", "words"),
    [
        ({"nnodes": "0"}, {}, "--nnodes"),
        ({"nnodes": "3:2"}, {}, "--nnodes"),
        ({"nnodes": "two"}, {}, "--nnodes"),
        ({"nnodes": "2"}, {}, "--node-rank"),
        ({"nnodes": "2", "node_rank": 2}, {}, "below --nnodes 2"),
        ({"nnodes": "3", "node_rank": 2}, STEP, "SLURM_NODEID"),
        ({"nnodes": "2", "rdzv_endpoint": "h:99999"}, {}, "--rdzv-endpoint"),
        ({"nnodes": "2", "node_rank": 0, "rdzv_conf": "join_timeout"}, {}, "--rdzv-conf"),
        ({"nnodes": "2", "node_rank": 0, "rdzv_conf": "join_timeout=x"}, {}, "join_timeout"),
    ],
)
def test_mistakes_are_named(options, environ, words):
    with pytest.raises(UsageError, match=words):
        layout(LaunchConfig(**options), environ)


def test_timeouts_are_torchs_and_foreign_keys_are_passed_over():
    text = "join_timeout=60, keep_alive_interval=1,read_timeout=3,keep_alive_max_attempt=4"
    place = layout(LaunchConfig(nnodes="2", node_rank=0, rdzv_conf=text), {})
    assert place is not None
    assert place.timeouts == Timeouts(60.0, 30.0, 1.0, 4.0)
    assert place.timeouts.silence == 4.0
