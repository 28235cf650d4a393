"""Speech as feature vectors, frame by frame: the set `spoken-digits` from recordings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.io import wavfile
from scipy.signal import lfilter

from sharpness._arguments import ensure

RATE = 8000  # samples a second
_HOP, _WINDOW, _FFT = 80, 200, 512  # samples: a frame every 10 ms sees 25 ms
_BANDS, _LOWEST, _HIGHEST = 40, 60.0, 3900.0  # Hz
_CONTEXT = 4  # frames to each side
_STATES = 8  # parts of a word
_TEST_TAKES = 5  # of 50: those the data set's authors set aside

Features = NDArray[np.float32]


def log_mel_features(signal: NDArray[np.int16]) -> Features:
    """Log-mel energies of each frame and its four neighbours on either side.

    Pre-emphasis y[t] = s[t] - 0.97 s[t - 1]; a Hamming window of 25 ms every 10 ms, about
    the middle of those 10 ms, with silence around the signal; the power of a 512-point
    Fourier transform; 40 triangles of height 1 whose corners are equally spaced from 60
    to 3900 Hz on the mel scale 2595 log10(1 + f / 700); log(energy + 1e-7). The first and
    last frames repeat where a neighbour is missing.

    Args:
        signal: a recording at 8 kHz, (num_samples,) int16, at least 80 samples long.

    Returns:
        (num_samples // 80, 360) float32: bands 0 to 39 of the frame four before, then of
        the one three before, and so on. Not normalised.

    Raises:
        ValueError: `signal` is something else.
    """
    kind = getattr(signal, "dtype", type(signal).__name__)
    ensure(
        kind == np.int16 and signal.ndim == 1 and len(signal) >= _HOP,
        "signal",
        f"be one channel of {_HOP} or more 16-bit samples",
        f"shape {np.shape(signal)} of {kind}",
        f"Mix channels down, and resample to {RATE} Hz.",
    )
    emphasised = lfilter([1, -0.97], 1, signal / 2**15)
    margin = (_WINDOW - _HOP) // 2
    padded = np.pad(emphasised, (margin, _WINDOW))
    windows = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::_HOP]
    frames = windows[: len(signal) // _HOP] * np.hamming(_WINDOW)
    power = np.abs(np.fft.rfft(frames, _FFT)) ** 2
    bands = np.log(power @ _mel_triangles().T + 1e-7)  # (frames, 40)
    around = np.arange(len(bands))[:, None] + np.arange(-_CONTEXT, _CONTEXT + 1)
    spliced = bands[around.clip(0, len(bands) - 1)]  # (frames, 9, 40)
    return np.asarray(spliced.reshape(len(bands), -1), np.float32)


def _mel_triangles() -> NDArray[np.float64]:
    """Weights (40, 257) of the transform's frequencies in each band."""
    lowest, highest = (2595 * np.log10(1 + hertz / 700) for hertz in (_LOWEST, _HIGHEST))
    corners = 700 * (10 ** (np.linspace(lowest, highest, _BANDS + 2) / 2595) - 1)
    frequencies = np.fft.rfftfreq(_FFT, 1 / RATE)
    triangles = zip(corners, corners[1:], corners[2:], strict=False)
    return np.stack([np.interp(frequencies, three, (0, 1, 0)) for three in triangles])


def write_spoken_digits(recordings: str | Path, path: str | Path) -> None:
    """Build `spoken-digits.npz` from the recordings of the Free Spoken Digit Dataset.

    A label is the state (speaker * 10 + digit) * 8 + e of a frame in the e-th eighth of
    its recording: a flat start, not an alignment. Takes 0 to 4 of each speaker and digit
    are the test part, as the data set's authors have it. Features are centred and scaled
    by the training part's mean and standard deviation. Cost: ten seconds and 1.4 GB.

    Args:
        recordings: a folder of `{digit}_{speaker}_{take}.wav` files, 8 kHz, 16 bit;
            speakers are numbered in alphabetical order.
        path: the file to write, named `spoken-digits.npz` to be found as a named set.

    Raises:
        ValueError: the folder holds no such recordings, or none of one part.

    References:
        Jackson et al., Free Spoken Digit Dataset, CC BY-SA 4.0. The features and the
        labels are this package's choice: 360 inputs as Keskar et al. (2017) have for F2.
    """
    takes = _takes(Path(recordings))
    speakers = sorted({speaker for speaker, *_ in takes})
    parts: dict[str, list[Any]] = {"train": [], "test": []}
    for speaker, digit, number, file in takes:
        features = log_mel_features(_signal(file))
        eighth = np.arange(len(features)) * _STATES // len(features)
        states = (speakers.index(speaker) * 10 + digit) * _STATES + eighth
        parts["test" if number < _TEST_TAKES else "train"].append((features, states))
    (train_x, train_y), (test_x, test_y) = (
        map(np.concatenate, zip(*part, strict=True)) for part in parts.values()
    )
    mean, deviation = (f(train_x, axis=0, dtype=np.float64) for f in (np.mean, np.std))
    train_x, test_x = (((x - mean) / deviation).astype("f4") for x in (train_x, test_x))
    np.savez(path, train_x=train_x, train_y=train_y, test_x=test_x, test_y=test_y)


def _takes(folder: Path) -> list[tuple[str, int, int, Path]]:
    """Speaker, digit, number and file of each recording, in this order."""
    named = re.compile(r"(\d)_(\w+)_(\d+)\.wav")
    found = [(named.fullmatch(file.name), file) for file in folder.glob("*")]
    takes = sorted((m[2], int(m[1]), int(m[3]), file) for m, file in found if m)
    ensure(
        len({number < _TEST_TAKES for _, _, number, _ in takes}) == 2,
        "recordings",
        "be a folder with files such as 3_jackson_0.wav, of takes below and from "
        f"{_TEST_TAKES}",
        f"{folder} ({len(takes)} such files)",
        "The Free Spoken Digit Dataset has one of that name.",
    )
    return takes


def _signal(file: Path) -> NDArray[np.int16]:
    rate, signal = wavfile.read(file)
    ensure(rate == RATE, file, f"be recorded at {RATE} Hz", str(rate), "Resample it first.")
    return np.asarray(signal)
