"""Stage "why" of the GPU command, on events and programs that are made up."""

import json
import time
from types import SimpleNamespace

import jax
import pytest
from gpu_stages import flags, trace, why
from gpu_stages.parts import Settings
from gpu_stages.trace import Event
from kernel_costs import CONVOLUTION, ELEMENTWISE, Kernel

_KERNELS = {
    "conv.1": Kernel("conv.1", CONVOLUTION, 2_000, 6_000_000, 1),
    "add.2": Kernel("add.2", ELEMENTWISE, 4_000, 0, 2),
}


def _steps(count):
    """Steps of 1,000 ns: a convolution in two kernels, two additions of which one runs beside it, and 300 ns idle."""
    events = []
    for step in range(count):
        at = 10_000 + 1_000 * step
        events += [
            Event("start", at, at + 50, "first.0"),
            Event("cudnn_transpose", at + 50, at + 150, "conv.1"),
            Event("cudnn_kernel", at + 150, at + 550, "conv.1"),
            # On another stream.
            Event("add_kernel", at + 100, at + 200, "add.2"),
            Event("add_kernel", at + 600, at + 750, "add.2"),
        ]
    return [Event("copy", 0, 900, "outside.3"), *events]


def test_window_is_the_middle_steps():
    window = trace.cut(reversed(_steps(10)), chunk=10, most=4)
    assert (window.steps, window.starts) == (4, [13_000, 14_000, 15_000, 16_000, 17_000])
    assert (len(window.events), window.events[0].start_ns, window.events[-1].start_ns) == (20, 13_000, 16_600)


def test_steps_that_cannot_be_told_apart_are_taken_together():
    window = trace.cut(_steps(10), chunk=7, most=4)
    assert (window.steps, window.starts, len(window.events)) == (7, [], 51)


def test_costliest_kernels_have_what_they_achieve():
    first, second, third = trace.costliest(trace.cut(_steps(10), 10, 4), _KERNELS)
    assert first == {
        "op": "conv.1",
        "kernel": "cudnn_transpose",
        "class": CONVOLUTION,
        "share": pytest.approx(500 / 800),
        "ms_per_step": pytest.approx(500e-6),
        "calls_per_step": 2,
        "bytes": 2_000,
        "flops": 6_000_000,
        "tb_per_s": pytest.approx(2_000 / 500e-9 / 1e12),
        "tflops": pytest.approx(12),
    }
    assert (second["op"], second["calls_per_step"], second["bytes"]) == ("add.2", 2, 8_000)
    assert (third["class"], third["bytes"], third["tflops"]) == (trace.OUTSIDE, None, None)
    assert len(trace.costliest(trace.cut(_steps(10), 10, 4), _KERNELS, count=1)) == 1


def test_time_by_class():
    found = trace.classes(trace.cut(_steps(10), 10, 4), _KERNELS)
    assert list(found) == [CONVOLUTION, ELEMENTWISE, trace.OUTSIDE]
    assert found[CONVOLUTION] == {"ms": pytest.approx(500e-6), "share": pytest.approx(0.625), "kernels": 2}
    assert sum(of_class["share"] for of_class in found.values()) == pytest.approx(1)


def test_gaps_are_where_no_stream_works():
    rows, busy = trace.gaps(trace.cut(_steps(10), 10, 4), count=5)
    # Three between steps, then the first of 50 ns; of the last step the gap's end is the window's.
    assert [row["us"] for row in rows] == [0.25, 0.25, 0.25, 0.05, 0.05]
    assert rows[0] == {"us": 0.25, "at_ms": pytest.approx(750e-6), "before": "add.2", "after": "first.0"}
    assert rows[3] == {"us": 0.05, "at_ms": pytest.approx(550e-6), "before": "conv.1", "after": "add.2"}
    assert busy["span_ms"] == pytest.approx(1e-3)
    assert busy["busy_share"] == pytest.approx(0.7)
    assert busy["gaps"] == 7 / 4


def test_a_long_kernel_leaves_no_gap_behind_a_short_one():
    events = [Event("long", 0, 100, ""), Event("short", 10, 20, ""), Event("next", 100, 120, "")]
    rows, busy = trace.gaps(trace.Window(events, [], 1))
    assert (rows, busy["busy_share"]) == ([], 1)


def test_known_share_is_of_time():
    events = [Event("graph", 0, 30, ""), Event("k", 30, 40, "conv.1"), Event("k", 40, 50, "other.9")]
    assert trace.known_share(trace.Window(events, [], 1), _KERNELS) == 0.2
    assert trace.known_share(trace.Window([], [], 1), _KERNELS) == 0


def test_kernels_in_a_command_buffer_are_found_by_their_names():
    events = [Event("conv_1", 0, 60, "command_buffer"), Event("nvjet_sm90", 60, 70, "command_buffer")]
    found = trace.resolved([*events, Event("add_2", 70, 80, "conv.1")], _KERNELS)
    assert [event.hlo_op for event in found] == ["conv.1", "command_buffer", "conv.1"]
    assert trace.known_share(trace.Window(found, [], 1), _KERNELS) == 0.875


def _plane(name, **lines):
    def event(name, start, duration, op):
        stats = [("correlation_id", 7), *([("hlo_op", op)] if op else [])]
        return SimpleNamespace(name=name, start_ns=start, duration_ns=duration, stats=stats)

    named = [(line.replace("_", " #"), events) for line, events in lines.items()]
    lines = [SimpleNamespace(name=line, events=[event(*e) for e in events]) for line, events in named]
    return SimpleNamespace(name=name, lines=lines)


def test_events_are_those_of_the_gpu_s_streams(monkeypatch, tmp_path):
    gpu = _plane(
        "/device:GPU:0",
        Stream_13=[("kernel", 5.0, 2.0, "conv.1"), ("memset", 8.0, 1.0, "")],
        Stream_14=[("copy", 6.0, 1.0, "copy.1")],
        XLA_Ops=[("conv.1", 5.0, 2.0, "conv.1")],
    )
    host = _plane("/host:CPU", python=[("f", 0.0, 9.0, "")], worker=[("conv.1", 1.0, 2.0, "conv.1")])
    data = SimpleNamespace(planes=[host, gpu])
    monkeypatch.setattr(jax.profiler, "ProfileData", SimpleNamespace(from_file=lambda path: data))
    assert trace.read_events(tmp_path) == [
        Event("kernel", 5, 7, "conv.1"),
        Event("memset", 8, 9, ""),
        Event("copy", 6, 7, "copy.1"),
    ]
    data.planes = [host]
    assert trace.read_events(tmp_path) == [Event("conv.1", 1, 3, "conv.1")]


_TEXT = """
%body (s: f32[2,2]) -> f32[2,2] {
  %s = f32[2,2] parameter(0)
  ROOT %dot.1 = f32[2,2] dot(%s, %s), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jvp()/dot"}
}

%condition (s.1: f32[2,2]) -> pred[] {
  %s.1 = f32[2,2] parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (x: f32[2,2]) -> f32[2,2] {
  %x = f32[2,2] parameter(0)
  ROOT %while.1 = f32[2,2] while(%x), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
}
"""


def _settings(tmp_path, device="gpu", deadline=100.0):
    return Settings(device, True, tmp_path, tmp_path, tmp_path, None, time.time() + deadline)


def _run(seconds, losses=(9.0, 4.0)):
    """A `ChunkRun` that takes as long as it is asked to."""
    run = lambda: seconds()  # noqa: E731
    run.losses = list(losses)
    return run


def _program(variant):
    executable = SimpleNamespace(as_text=lambda: _TEXT)
    return SimpleNamespace(run=_run(lambda: 1.0), steps=3, compile_seconds=0.1, compiled=executable, variant=variant)


@pytest.mark.parametrize(("op", "source"), [("dot.1", "as trained"), ("", "a second profile, without command buffers")])
def test_hidden_kernels_are_profiled_again_without_command_buffers(monkeypatch, tmp_path, op, source):
    def events(name, op):
        return [Event(name, 100 * step, 100 * step + 60, op) for step in range(3)]

    recorded = [events("graph", op), events("kernel", "dot.1")]
    compiled_with = []

    def variant(options):
        compiled_with.append(options)
        # Should this end the process, the first profile is there.
        first = json.loads((tmp_path / "why_profile.json").read_text())
        assert first["kernels_from"] == "as trained, though command buffers hide most"
        return lambda: 1.0, SimpleNamespace(as_text=lambda: _TEXT)

    loop = Event("while", 0, 300, "while.1")
    monkeypatch.setattr(why, "program", lambda tiny: _program(variant))
    monkeypatch.setattr(trace, "record", lambda run, folder: [*recorded.pop(0), loop])
    (tmp_path / "fast.json").write_text(
        json.dumps({"parts": {"rates": {"result": {"matmul_flops_per_s": 1e9, "copy_bytes_per_s": 1e9}}}})
    )
    found = why.profile(_settings(tmp_path))
    assert found["kernels_from"] == source
    assert compiled_with == ([] if op else [{"xla_gpu_enable_command_buffer": ""}])
    assert [kernel["op"] for kernel in found["kernels"]] == ["dot.1"]
    assert found["kernels"][0]["flops"] == 2 * 2 * 2 * 2
    assert not (tmp_path / "why_profile.json").exists()
    assert (found["busy"]["busy_share"], len(found["gaps"])) == (pytest.approx(0.6), 1)
    assert found["classes"]["matrix product"]["predicted_ms"] == pytest.approx(32e-6)
    assert found["rates"] == {"flops_per_s": 1e9, "bytes_per_s": 1e9, "measured": True}
    assert "\n" not in found["summary"]


def test_first_profile_is_reported_when_the_second_fails(monkeypatch, tmp_path):
    def variant(options):
        raise ValueError("does not\ncompile")

    monkeypatch.setattr(why, "program", lambda tiny: _program(variant))
    monkeypatch.setattr(trace, "record", lambda run, folder: [Event("graph", 0, 60, ""), Event("graph", 100, 160, "")])
    found = why.profile(_settings(tmp_path))
    assert found["kernels_from"].endswith("a second profile failed: does not compile")
    assert [kernel["kernel"] for kernel in found["kernels"]] == ["graph"]
    found = why.profile(_settings(tmp_path, deadline=10))
    assert found["kernels_from"].endswith("no time for a second profile")


def test_trace_without_events_is_a_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(why, "program", lambda tiny: _program(None))
    monkeypatch.setattr(trace, "record", lambda run, folder: [])
    with pytest.raises(RuntimeError, match="no events"):
        why.profile(_settings(tmp_path))


def test_kernels_are_found_without_the_text_of_the_program(monkeypatch, tmp_path):
    def lost():
        raise NotImplementedError("a program from the cache")

    program = _program(None)
    program.compiled.as_text = lost
    monkeypatch.setattr(why, "program", lambda tiny: program)
    events = [Event("kernel", 100 * step, 100 * step + 60, "dot.1") for step in range(3)]
    monkeypatch.setattr(trace, "record", lambda run, folder: events)
    found = why.profile(_settings(tmp_path, deadline=1.0))
    assert [kernel["op"] for kernel in found["kernels"]] == ["dot.1"]
    assert found["kernels_from"].endswith("no time for a second profile")
    assert "costliest `dot.1` 100.0%" in found["summary"]


def test_flags_are_measured_refused_or_not_reached(monkeypatch, tmp_path):
    table = {"first": {"a": 1}, "unknown": {"b": 1}, "breaks": {"c": 1}, "last": {"d": 1}}
    monkeypatch.setattr(flags, "FLAGS", table)
    clock, saved = [0.0], []

    def variant(options):
        if options == {"b": 1}:
            raise ValueError("No such compile option: 'b'\nmore")
        records = json.loads((tmp_path / "why_flags.json").read_text())
        saved.append({name: record["status"] for name, record in records.items()})
        if options == {"c": 1}:
            return _run(lambda: 1 / 0), None
        clock[0] += 60
        return _run(lambda: 0.5, (9.0, 5.0 if options == {"d": 1} else 4.01)), None

    monkeypatch.setattr(flags, "time", SimpleNamespace(time=lambda: clock[0]))
    monkeypatch.setattr(flags, "_WORKERS", 1)
    settings = _settings(tmp_path)._replace(tiny=False)
    found = flags.measure(_program(variant), settings, end=100.0)
    status = {name: record["status"] for name, record in found["flags"].items()}
    assert status == {
        "first": "measured",
        "unknown": "not reached",
        "breaks": "not reached",
        "last": "not reached",
    }
    assert found["flags"]["first"]["ratio"] == {"median": 0.5, "low": 0.5, "high": 0.5}
    clock[0] = -1000.0
    found = flags.measure(_program(variant), settings, end=100.0)
    status = {name: record["status"] for name, record in found["flags"].items()}
    assert status["unknown"] == "refused: No such compile option: 'b'"
    assert status["breaks"].startswith("failed: ")
    assert status["first"] == "measured"
    # Faster, but it computes something else.
    assert status["last"] == "wrong: the loss of step 1 is 5, not 4"
    assert "compiled" in saved[-2].values()
    assert not (tmp_path / "why_flags.json").exists()
    assert "\n" not in found["summary"]


def test_rounds_end_in_time(monkeypatch):
    clock = [0.0]

    def run():
        clock[0] += 10
        return 10.0

    monkeypatch.setattr(flags, "time", SimpleNamespace(time=lambda: clock[0]))
    seconds = flags.rounds_in_turns({"as trained": run, "other": run}, {"other": {}}, rounds=9, end=70)
    assert {name: len(taken) for name, taken in seconds.items()} == {"as trained": 2, "other": 2}
    assert clock[0] <= 70
