"""A short run of what `python tests/fuzz` does at length, and a conversation that hypothesis leads."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import rootstockd
import streams
from benchmarks import machine
from check import random_input
from rootstock_client import ipi
from sides import EnginePlayer, deliver, read_driver

SEEDS = [streams.driver_stream(random.Random(seed)) for seed in range(20)]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # cells whose volume is no double


def test_a_stream_means_the_same_to_everybody() -> None:
    """Other streams each time; an error has the one that does not, to become a file of the corpus."""
    rng = random.Random()
    for _ in range(2000):
        random_input(rng, SEEDS)


@pytest.mark.parametrize("spoil", ["", "check.read_engine = lambda *_, **__: None\n"])
def test_the_command_fails_when_something_is_found(tmp_path: Path, spoil: str) -> None:
    """With another reading of the protocol in the place of the right one, say."""
    here, output = Path(__file__).parent, tmp_path / "result.json"
    code = f"import runpy, sys\nsys.path.insert(0, {str(here)!r})\nimport check\n{spoil}"
    code += f"runpy.run_path({str(here)!r}, run_name='__main__')\n"
    options = ["--inputs", "200", "--connections", "0", "--output", str(output)]
    done = subprocess.run([sys.executable, "-c", code, *options], check=False, capture_output=True, text=True)
    result = json.loads(output.read_text())
    assert result["commit"] == machine.commit() and result["software"]["rootstockd"] == rootstockd.__version__
    assert (done.returncode, bool(result["sides"]["findings"])) == ((1, True) if spoil else (0, False)), done.stderr
    both = {"rootstock_client.engine_side", "rootstock_client.driver_side"}
    assert all(result["coverage"][side]["run"] > 0 for side in both)


def system(natoms: int, batch: int, *, model: str = "noop") -> bytes:
    numbers, pbc = [29] * natoms, "[false, false, false]"
    text = f'{{"rootstock": 1, "model": "{model}", "numbers": {numbers}, "pbc": {pbc}, "batch_size": {batch}}}'
    return ipi.init_frame(text.encode())


def step(natoms: int, batch: int) -> bytes:
    pairs, count = bytes(144 * batch), natoms.to_bytes(4, "little")
    return ipi.POSDATA + (pairs + count if batch == 1 else count + pairs) + bytes(24 * natoms * batch)


shapes = st.tuples(st.sampled_from([1, 2, 30]), st.sampled_from([1, 2, 3]))


class Conversation(RuleBasedStateMachine):
    """A driver says one thing after another, of which the daemon hears bit by bit."""

    def __init__(self) -> None:
        super().__init__()
        self.player = EnginePlayer(late=True)
        self.said = self.heard = b""

    @rule(word=st.sampled_from([ipi.STATUS, ipi.GETFORCE, ipi.GETFORCE, ipi.EXIT, b"GIVEFORCE   "]))
    def say(self, word: bytes) -> None:
        self.said += word

    @rule(shape=shapes, model=st.sampled_from(["noop", "noop", "other"]))
    def say_init(self, shape: tuple[int, int], model: str) -> None:
        self.said += system(*shape, model=model)

    @rule(text=st.sampled_from([b"", b"batch_size:2", b"{"]))
    def say_text(self, text: bytes) -> None:
        self.said += ipi.init_frame(text)

    @rule(shape=shapes, fetch=st.booleans())
    def say_posdata(self, shape: tuple[int, int], fetch: bool) -> None:
        self.said += step(*shape) + ipi.GETFORCE * fetch

    @rule(shape=shapes)
    def say_what_is_right(self, shape: tuple[int, int]) -> None:
        self.said += system(*shape) + step(*shape) + ipi.STATUS + ipi.GETFORCE

    @rule(size=st.one_of(st.integers(1, 30), st.just(10**6)), cuts=st.lists(st.floats(0, 1), max_size=3))
    def hear(self, size: int, cuts: list[float]) -> None:
        piece, self.said = self.said[:size], self.said[size:]
        edges = [round(cut * len(piece)) for cut in cuts]
        deliver(self.player.side, piece, edges, self.player.outcome, self.player.take)
        self.heard += piece

    @invariant()
    def it_means_what_has_been_heard(self) -> None:
        assert self.player.outcome == read_driver(self.heard)


TestConversation = Conversation.TestCase
TestConversation.settings = settings(max_examples=60, stateful_step_count=25)
