"""Steps replayed from recordings: the same samples, of a few sizes, and nothing that went stale."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from actors.generation import cached_decoder
from actors.generation.graphs import Graphs, coarse
from actors.generation.interface import Generated
from common.config.model import LoraConfig, PalmConfig
from common.devices import Doing, Record, recorder_on
from common.errors import TrainingError
from common.models.adapters import add_adapter
from common.models.decoder import Decoder
from common.models.palm import PaLM
from tests.actors.generation.asked import engine, requests
from tests.common.models.pretrained.tiny import VARIANTS, loaded, reference
from tests.recorder import Recorder

LENGTHS = [3, 9, 9, 17, 30, 5, 41, 2, 12, 28, 7]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """What records, in the place of a GPU's."""
    made = Recorder()
    monkeypatch.setattr(cached_decoder, "recorder_on", lambda device: made)
    return made


@pytest.fixture(params=["palm", "qwen3", "gemma2"])
def decoder(request: pytest.FixtureRequest, tmp_path: Path) -> Decoder:
    if request.param != "palm":
        return loaded(reference(request.param), tmp_path).eval().requires_grad_(False)
    return palm()


def palm() -> Decoder:
    made = PaLM(PalmConfig(vocab_size=53, dim=32, layers=2, heads=4, head_dim=8, context=160))
    made.initialise(0)
    return made.eval().requires_grad_(False)


def tokens(made: list[Generated]) -> list[list[int]]:
    return [list(each.response_ids) for each in made]


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "adapters side by side"])
def test_what_is_replayed_is_what_is_computed(
    decoder: Decoder, beside: bool, recorder: Recorder
) -> None:
    adapters = ("", "own") if beside else ("",)
    if beside:
        add_adapter(decoder, "own", LoraConfig(rank=2), seed=0)
    merged = None if beside else ""
    asked = requests(LENGTHS, copies=2, adapters=adapters)
    plain = engine(decoder, graphs=False, merged=merged).generate(asked)
    assert recorder.recorded == 0
    found = engine(decoder, graphs=True, merged=merged).generate(asked)
    assert tokens(found) == tokens(plain)
    for ours, theirs in zip(found, plain, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
    assert recorder.recorded >= 1
    assert recorder.replayed > 3 * recorder.recorded


@pytest.mark.parametrize("name", VARIANTS)
def test_every_family_can_be_recorded(name: str, tmp_path: Path, recorder: Recorder) -> None:
    asked, policy = requests(LENGTHS), loaded(reference(name), tmp_path).requires_grad_(False)
    found = engine(policy.eval(), graphs=True).generate(asked)
    assert recorder.recorded >= 1, "a step looked at a number"
    assert tokens(found) == tokens(engine(policy, graphs=False).generate(asked))


def test_positions_that_a_cache_has_no_room_for_make_another_recording(recorder: Recorder) -> None:
    """Slots that are as long as a step needs: from 64 positions to 128, and back for the next."""
    asked = requests([50, 50, 3], copies=4)
    found, plain = (engine(palm(), graphs=graphs) for graphs in (True, False))
    for _ in range(2):
        assert tokens(found.generate(asked)) == tokens(plain.generate(asked))
    assert recorder.recorded >= 4


def test_new_weights_and_memory_are_not_those_of_a_recording(recorder: Recorder) -> None:
    """Weights that moved, and a cache that was given back between two leases."""
    policy, asked = palm(), requests(LENGTHS)
    running = engine(policy, graphs=True)
    running.submit(asked)
    while not running.idle:  # without the rest that comes behind a lease
        running.step()
    once = recorder.recorded
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.data = parameter.data.flip(0).clone()
    running.refresh()
    assert tokens(running.generate(asked)) == tokens(engine(policy, graphs=False).generate(asked))
    assert recorder.recorded > once


def test_a_lease_is_replayed_alike_whatever_came_before(recorder: Recorder) -> None:
    running = engine(palm(), graphs=True)
    asked, counts = requests(LENGTHS), []
    for before in ([], requests([40, 3, 3], copies=3)):
        if before:
            running.generate(before)
        recorder.recorded = recorder.replayed = 0
        running.generate(asked)
        counts.append((recorder.recorded, recorder.replayed))
    assert counts[0] == counts[1]


def test_a_model_that_looks_at_numbers_is_not_recorded_and_says_so(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    states = PaLM.states

    def looking(self: PaLM, *args: object) -> Tensor:
        hidden = states(self, *args)  # type: ignore[arg-type]
        return hidden if hidden.sum().item() < 1e9 else -hidden

    monkeypatch.setattr(PaLM, "states", looking)
    asked, policy = requests(LENGTHS), palm()
    with caplog.at_level(logging.WARNING):
        found = engine(policy, graphs=True).generate(asked)
    assert tokens(found) == tokens(engine(policy, graphs=False).generate(asked))
    assert (recorder.recorded, recorder.replayed) == (0, 0)
    [warning] = caplog.messages
    assert warning.startswith("decode steps are not recorded in CUDA graphs: aten._local_scalar")


@pytest.mark.parametrize(
    "replayed",
    [lambda step: step().mul_(1.01), lambda step: None],
    ids=["something else", "nothing"],
)
def test_a_recording_that_does_not_compute_its_step_ends_the_run(
    replayed: Callable[[Doing], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one would that reads what has been written over since, or that was not recorded."""

    def begin() -> Record:
        return lambda step: lambda: replayed(step)

    monkeypatch.setattr(cached_decoder, "recorder_on", lambda device: begin)
    with pytest.raises(TrainingError, match=r"off by .*rollout\.graphs"):
        engine(palm(), graphs=True).generate(requests(LENGTHS))


def test_without_memory_for_recordings_it_goes_on_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def record(step: Doing) -> Callable[[], object]:
        step().fill_(torch.nan)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cached_decoder, "recorder_on", lambda device: lambda: record)
    asked = requests(LENGTHS)
    found = engine(palm(), graphs=True).generate(asked)
    assert tokens(found) == tokens(engine(palm(), graphs=False).generate(asked))
    [warning] = caplog.messages
    assert "CUDA out of memory" in warning


class Refusing:
    """A CUDA graph that is told to end after what it does not permit, and complains of that."""

    ended = 0

    def capture_begin(self, **_: object) -> None:
        pass

    def capture_end(self) -> None:
        Refusing.ended += 1
        raise RuntimeError("operation failed due to a previous error during capture")


def test_why_a_gpu_records_nothing_is_what_the_step_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the calls into CUDA alone, which stand-ins take: there is no GPU here."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Refusing)
    for name in ("Stream", "current_stream", "synchronize", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    begin = recorder_on(torch.device("cuda:0"))
    assert begin is not None
    with pytest.raises(ZeroDivisionError):
        begin()(lambda: torch.zeros(int(1 / 0)))
    assert Refusing.ended == 1, "the stream would go on recording"


def test_only_the_latest_recordings_are_kept() -> None:
    recorder, out = Recorder(), torch.zeros(1)
    graphs = Graphs(recorder, torch.float32)

    def again(size: int, times: int) -> None:
        for _ in range(times):
            graphs.run((size,), lambda: out.fill_(size))
            assert float(out) == size

    for size in range(70):
        again(size, 3)
        again(0, 1)
    recorded = recorder.recorded
    again(0, 1)
    again(69, 1)
    assert recorder.recorded == recorded, "both are kept"
    again(1, 1)
    assert recorder.recorded == recorded + 1, "it was dropped, and comes back at once"


def test_processors_record_nothing() -> None:
    assert recorder_on(torch.device("cpu")) is None


@given(number=st.integers(1, 10_000), finest=st.sampled_from([1, 64]))
def test_sizes_are_few_and_near(number: int, finest: int) -> None:
    size = coarse(number, finest)
    assert number <= size <= max(number + finest - 1, number * 1.25)
    assert coarse(size, finest) == size
    assert size % finest == 0


def test_there_are_four_sizes_in_each_doubling() -> None:
    assert {coarse(n, 1) for n in range(513, 1025)} == {640, 768, 896, 1024}
    assert {coarse(n, 64) for n in range(1, 257)} == {64, 128, 192, 256}
