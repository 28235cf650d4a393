import math

import numpy as np
import pytest
from scipy.io import wavfile

from sharpness.lab.data import load
from sharpness.lab.speech import log_mel_features, write_spoken_digits


def recording(num_samples=1650, seed=0):
    noise = np.random.default_rng(seed).normal(scale=2000, size=num_samples)
    tone = 6000 * np.sin(2 * np.pi * (300 + 100 * seed) * np.arange(num_samples) / 8000)
    return (noise + tone).astype(np.int16)


def mel(frequency):
    return 2595 * math.log10(1 + frequency / 700)


def triangle(band, frequency):
    """Height of a band at a frequency, from its three corners."""
    step = (mel(3900) - mel(60)) / 41
    low, middle, high = (
        700 * (10 ** ((mel(60) + (band + i) * step) / 2595) - 1) for i in range(3)
    )
    if low <= frequency <= middle:
        return (frequency - low) / (middle - low)
    return (high - frequency) / (high - middle) if middle < frequency <= high else 0.0


def energies(signal, frame):
    """Of 40 bands: sums over 200 samples about the frame's middle, one at a time."""
    s = [float(v) / 32768 for v in signal]
    weighted = []
    for i in range(200):
        t = 80 * frame - 60 + i
        before = s[t - 1] if 0 < t <= len(s) else 0.0
        value = s[t] - 0.97 * before if 0 <= t < len(s) else 0.0
        weighted.append(value * (0.54 - 0.46 * math.cos(2 * math.pi * i / 199)))
    angles = 2 * np.pi / 512 * np.outer(np.arange(257), np.arange(200))
    real, imaginary = np.cos(angles) @ weighted, np.sin(angles) @ weighted
    power = real**2 + imaginary**2
    return [
        math.log(sum(triangle(b, 8000 * k / 512) * p for k, p in enumerate(power)) + 1e-7)
        for b in range(40)
    ]


def test_features_are_those_of_a_plain_fourier_transform():
    signal = recording()
    features = log_mel_features(signal)
    assert (features.shape, features.dtype) == ((20, 360), np.float32)
    for frame in (0, 1, 9, 19):
        for neighbour in (-4, -1, 0, 3, 4):
            expected = energies(signal, min(max(frame + neighbour, 0), 19))
            at = 40 * (neighbour + 4)
            np.testing.assert_allclose(features[frame, at : at + 40], expected, rtol=1e-5)


def test_silence_is_the_floor_and_the_shortest_signal_one_frame():
    features = log_mel_features(np.zeros(80, np.int16))
    assert features.shape == (1, 360)
    np.testing.assert_allclose(features, math.log(1e-7), rtol=1e-6)


@pytest.mark.parametrize(
    ("signal", "got"),
    [
        (np.zeros(79, np.int16), r"shape \(79,\) of int16"),
        (np.zeros((800, 2), np.int16), r"shape \(800, 2\)"),
        (np.zeros(800), "of float64"),
        ([0] * 800, "of list"),
    ],
)
def test_what_is_no_recording_is_refused(signal, got):
    with pytest.raises(ValueError, match=f"`signal` must .* got .*{got}") as caught:
        log_mel_features(signal)
    assert "\n" not in str(caught.value)


@pytest.fixture
def recordings(tmp_path):
    """Two speakers, digits 0 and 3, takes 4 (to test), 5 and 10, all of other lengths."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    lengths = {}
    for i, speaker in enumerate(("theo", "anna")):
        for digit in (0, 3):
            for take in (4, 5, 10):
                name = f"{digit}_{speaker}_{take}"
                lengths[name] = 1300 + 80 * (i + digit + take)
                wavfile.write(folder / f"{name}.wav", 8000, recording(lengths[name], take))
    (folder / "README.wav").touch()
    return folder, lengths


def test_the_set_is_built_from_recordings(recordings, tmp_path):
    folder, lengths = recordings
    write_spoken_digits(folder, tmp_path / "spoken-digits.npz")
    dataset = load("spoken-digits", data_dir=tmp_path)
    (x, y), (_, test_y) = ((a.numpy(), b.numpy()) for a, b in (dataset.train, dataset.test))
    frames = {name: length // 80 for name, length in lengths.items()}
    assert len(test_y) == sum(n for name, n in frames.items() if name.endswith("_4"))
    assert len(x) == sum(frames.values()) - len(test_y)
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(x.std(0), 1, atol=1e-5)
    # The first training recording is anna's 0, take 5; the last theo's 3, take 10.
    first, last = frames["0_anna_5"], frames["3_theo_10"]
    assert y[:first].tolist() == [8 * t // first for t in range(first)]
    assert y[-last:].tolist() == [104 + 8 * t // last for t in range(last)]
    assert dataset.num_classes == 112
    raw = log_mel_features(recording(lengths["0_anna_5"], 5))
    slopes = [np.polyfit(raw[:, j], x[:first, j], 1, full=True) for j in (0, 200, 359)]
    for (slope, _), residual, *_ in slopes:
        assert slope > 0
        assert residual < 1e-8


def test_a_folder_without_recordings_or_at_another_rate_is_refused(recordings, tmp_path):
    folder, _ = recordings
    path = tmp_path / "spoken-digits.npz"
    with pytest.raises(ValueError, match=r"`recordings` must .* got .* \(0 such files\)"):
        write_spoken_digits(tmp_path, path)
    wavfile.write(folder / "1_anna_7.wav", 16000, recording())
    with pytest.raises(ValueError, match=r"1_anna_7.wav` must .* 8000 Hz; got 16000\."):
        write_spoken_digits(folder, path)
    assert not path.exists()
