"""Timing: turns, counts and percentiles; the clock itself is the machine's."""

import json
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from raising import raises_naming
from wadi.metrics.speed import TimedPipeline, count_passes, measure_speed, parameter_count, percentile


def subject(steps, guided=False, seconds=0.0, log=None, name=""):
    network = nn.Linear(4, 4)

    def call(count):
        if log is not None:
            log.append((name, count))
        time.sleep(seconds * count)
        for _ in range(steps):
            network(torch.zeros(2 * count if guided else count, 4))

    return TimedPipeline(call, network, (nn.Linear(2, 2),))


def test_evaluations_are_rows_through_the_network_per_image():
    found = measure_speed({"student": subject(1), "teacher": subject(25, guided=True)}, repeats=1, batch=4)
    assert [speed.evaluations for speed in found] == [1, 50]
    assert [speed.parameters for speed in found] == [20 + 6, 20 + 6]
    assert [speed.name for speed in found] == ["student", "teacher"]


def test_subjects_take_turns():
    log = []
    measure_speed({"a": subject(1, log=log, name="a"), "b": subject(1, log=log, name="b")}, repeats=3, batch=2)
    assert log[-12:] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)] * 3


def test_times_are_those_of_the_clock():
    slow, fast = measure_speed({"slow": subject(1, seconds=0.02), "fast": subject(1, seconds=0.002)}, repeats=5, batch=2)
    assert 20 <= slow.latency_p50_ms <= slow.latency_p95_ms
    assert 20 < slow.images_per_second <= 50
    assert fast.latency_p50_ms < slow.latency_p50_ms


def test_percentiles_are_values_that_were_measured():
    assert percentile(range(1, 101), 0.95) == 95
    assert percentile(range(1, 101), 0.5) == 50
    assert percentile([3.0, 1.0, 2.0], 0.95) == 3
    assert percentile([7.0], 0.5) == 7


def test_shared_parameters_count_once():
    shared = nn.Linear(3, 3)
    assert parameter_count([shared, nn.Sequential(shared, nn.Linear(3, 1))]) == 12 + 4


def test_counting_ends_with_its_block_and_reads_keywords():
    network = nn.Bilinear(2, 2, 1)
    with count_passes(network) as count:
        network(input1=torch.zeros(3, 2), input2=torch.zeros(3, 2))
    network(torch.zeros(5, 2), torch.zeros(5, 2))
    assert (count.calls, count.rows) == (1, 3)


PEAKS = """
import json, sys
import torch
from wadi.metrics.speed import TimedPipeline, measure_speed
network = torch.nn.Linear(4, 4)
subjects = {
    "small": TimedPipeline(lambda count: network(torch.ones(count, 4)), network),
    "large": TimedPipeline(lambda count: torch.ones(50 * 2**20).sum(), network),
}
found = measure_speed({name: subjects[name] for name in sys.argv[1:]}, 1, 1)
print(json.dumps({speed.name: speed.peak_memory_mib for speed in found}))
"""


@pytest.mark.parametrize("order", [("small", "large"), ("large", "small")])
def test_peak_memory_is_each_subjects_own(order):
    """A pipeline that needs 200 MiB for a moment differs from one that does not, in either order.

    In a process of its own: one that has freed memory before may take it from there, and its resident memory does not grow.
    """
    done = subprocess.run([sys.executable, "-c", PEAKS, *order], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    if found["small"] is None:
        pytest.skip("this kernel does not tell a process's peak memory")
    assert found["large"] - found["small"] > 150


def test_nothing_to_measure_is_an_error():
    with raises_naming("0 pipelines"):
        measure_speed({})
    with raises_naming("0 repeats"):
        measure_speed({"a": subject(1)}, repeats=0)
