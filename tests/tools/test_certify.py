"""The certification: a slice of it, its oracle, and errors planted for it to find."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fewbits
from fewbits.formats import Format, exact

SCRIPT = Path(__file__).parents[2] / "tools/certify.py"
spec = importlib.util.spec_from_file_location("certify", SCRIPT)
certify = importlib.util.module_from_spec(spec)
sys.modules["certify"] = certify  # dataclasses look their module up
spec.loader.exec_module(certify)


@pytest.fixture(scope="module")
def oracles():
    return {name: certify.Oracle.of(name) for name in certify.FORMATS}


def judge(oracles, name, encode, count=1000):
    oracle = oracles[name]
    return certify.certify(name, oracle, certify.inputs_of_slice(oracle, count), encode)


@pytest.mark.parametrize("name", certify.FORMATS)
def test_a_slice_is_right(oracles, name):
    done = []
    inputs = certify.inputs_of_slice(oracles[name], 20_000)
    assert certify.certify(name, oracles[name], inputs, step=done.append) == (0, [])
    assert len(done) == 2  # signs
    assert sum(done) > 2 * (20_000 + 2 * len(oracles[name].thresholds))


@pytest.mark.parametrize("name", certify.FORMATS)
def test_the_slice_is_exact_arithmetic(oracles, name):
    magnitudes, codes = next(certify.inputs_of_slice(oracles[name], 300))
    every = max(len(magnitudes) // 500, 1)
    for bits, code in zip(magnitudes[::every].tolist(), codes[::every].tolist(), strict=True):
        assert code == exact.encode(certify._float(bits), Format.named(name)), hex(bits)


@pytest.mark.parametrize("name", certify.FORMATS)
def test_ranges_give_what_single_inputs_give(oracles, name):
    oracle = oracles[name]
    middle = int(oracle.thresholds[len(oracle.thresholds) // 2])
    for start, stop in [
        (0, 5000),
        (middle, middle + 5000),  # begins on a threshold
        (middle - 5000, middle),
        (int(oracle.thresholds[-1]) - 9, int(oracle.thresholds[-1]) + 9),
        (certify._INF - 5, certify._INF + 5),
        (certify._INF + 1, certify._INF + 9),
        (2**31 - 9, 2**31),
    ]:
        each = oracle.of_each(np.arange(start, stop, dtype=np.uint32))
        assert np.array_equal(oracle.of_range(start, stop), each), (start, stop)


def test_chunks_leave_nothing_out(oracles, monkeypatch):
    monkeypatch.setattr(certify, "_SIGN", 1 << 12)
    monkeypatch.setattr(certify, "CHUNK", 1 << 10)
    chunks = list(certify.inputs_in_all(oracles["bf16"]))
    assert len(chunks) == 4
    assert np.concatenate([magnitudes for magnitudes, _ in chunks]).tolist() == list(range(1 << 12))


@pytest.mark.parametrize("name", certify.FORMATS)
@pytest.mark.parametrize("rounding", ["nearest_away", "toward_zero"])
def test_another_rounding_is_found(oracles, name, rounding):
    wrong, first = judge(oracles, name, lambda x, name: fewbits.encode(x, name, rounding))
    ties = len(oracles[name].thresholds) // 2
    assert wrong >= ties
    assert len(first) == certify.SHOWN


def test_torchs_nan_is_found(oracles):
    """bf16's NaN is 0xFFFF in torch 2.13 from contiguous float32, in place of 0x7FC0."""
    wrong, first = judge(oracles, "bf16", lambda x, name: x.to(torch.bfloat16).view(torch.uint16))
    assert wrong > 0
    assert all(mismatch.bits & 0x7FFFFFFF > certify._INF for mismatch in first)


@pytest.mark.parametrize("bits", [0x477FEFFF, 0x80000000, 0x33000001, 0xFF800000])
def test_one_wrong_input_is_found_and_told(oracles, bits):
    """The last below fp16's Inf, -0, the first above half its smallest subnormal, -Inf."""

    def encode(x, name):
        codes = fewbits.encode(x, name)
        codes.view(torch.int16)[x.view(torch.int32) == np.uint32(bits).view(np.int32).item()] ^= 1
        return codes

    wrong, (only,) = judge(oracles, "fp16", encode)
    assert (wrong, only.bits) == (1, bits)
    assert only.got == only.expected ^ 1
    assert f"0x{bits:08X}) gives code {only.got:#x}, {only.expected:#x} is right" in str(only)


def test_the_command_says_what_it_certified(capsys):
    assert certify.main(["--slice", "100", "--formats", "e4m3fn,e5m2"]) == 0
    out = capsys.readouterr().out
    assert "e4m3fn: " in out
    assert out.count("all right") == 2


def test_the_command_fails_with_the_first_mismatches(capsys, monkeypatch):
    monkeypatch.setitem(certify._NAN, "e5m2", 0x7F)
    assert certify.main(["--slice", "100", "--formats", "e4m3fn,e5m2"]) == 1
    out = capsys.readouterr().out
    assert "e4m3fn: " in out.splitlines()[1]
    assert "all right" in out.splitlines()[1]
    assert "WRONG" in out.splitlines()[2]
    assert "e5m2: nan (0x7F800001) gives code 0x7e, 0x7f is right" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--formats", "fp16,nf4"], "'nf4' is not certified; fp16, bf16, e4m3fn, e5m2 are"),
        (["--slice", "0"], "--slice 0: give 1 or more"),
    ],
)
def test_wrong_options(capsys, options, message):
    with pytest.raises(SystemExit) as ended:
        certify.main(options)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
