"""Sound is prepared as the reference library prepares it, and what is no sound is refused."""

from __future__ import annotations

import json
import math
import struct
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyformer.data.audio import LogMel, SoundReader, Waveform, mel_bands, read_config, read_wav
from polyformer.data.images import ImageReader
from polyformer.errors import DataError, SpecError, WeightsError

transformers = pytest.importorskip("transformers")


def tone(seconds: float, rate: int = 16000, pitch: float = 440.0) -> np.ndarray[Any, Any]:
    """Return a fading tone with some noise."""
    time = np.arange(int(seconds * rate)) / rate
    chance = np.random.default_rng(int(seconds * 1000))
    faded = np.sin(2 * math.pi * pitch * time) * np.exp(-time) * 0.5
    return (faded + chance.normal(0, 0.01, len(time))).astype(np.float32)


def save(file: Path, samples: np.ndarray[Any, Any], rate: int = 16000, width: int = 2, channels: int = 1) -> Path:
    """Write a WAV file; `samples` from -1 to 1, channels interleaved."""
    whole = np.clip(np.round(samples * 2.0 ** (8 * width - 1)), -(2.0 ** (8 * width - 1)), 2.0 ** (8 * width - 1) - 1)
    data = whole.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width]
    with wave.open(str(file), "wb") as out:
        out.setparams((channels, width, rate, 0, "NONE", ""))
        out.writeframes((data + 128 if width == 1 else data).astype(np.uint8).tobytes())
    return file


@pytest.mark.parametrize(
    "changes",
    [
        {"chunk_length": 2},
        {"chunk_length": 1, "feature_size": 128, "hop_length": 100, "n_fft": 512},
        {"chunk_length": 1, "sampling_rate": 22050, "feature_size": 20, "n_fft": 401},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_whisper_s_features(changes: dict[str, int], tmp_path: Path) -> None:
    theirs = transformers.WhisperFeatureExtractor(**changes)
    theirs.save_pretrained(tmp_path)
    reader = SoundReader.find(tmp_path)
    assert isinstance(reader, LogMel)
    rate = reader.sampling_rate
    sounds = [tone(0.9, rate), tone(0.33, rate, 3000.0), np.zeros(5, np.float32)]
    wanted = theirs(sounds, sampling_rate=rate, return_tensors="pt")["input_features"]
    found, mask = reader.prepare([torch.from_numpy(one) for one in sounds])
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)
    assert mask is None
    torch.testing.assert_close(mel_bands(reader), torch.from_numpy(theirs.mel_filters.T).float(), atol=1e-7, rtol=1e-6)
    (tmp_path / "again").mkdir()
    reader.save(tmp_path / "again")
    assert SoundReader.find(tmp_path / "again") == reader
    again = transformers.WhisperFeatureExtractor.from_pretrained(tmp_path / "again")
    assert again(sounds, sampling_rate=rate, return_tensors="pt")["input_features"].equal(wanted)


@pytest.mark.parametrize("normalise", [True, False])
def test_wav2vec_s_waveforms(normalise: bool, tmp_path: Path) -> None:
    theirs = transformers.Wav2Vec2FeatureExtractor(do_normalize=normalise, return_attention_mask=True)
    theirs.save_pretrained(tmp_path)
    reader = SoundReader.find(tmp_path)
    assert isinstance(reader, Waveform)
    sounds = [tone(0.1), tone(0.07)]
    wanted = theirs(sounds, sampling_rate=16000, padding=True, return_tensors="pt")
    found, mask = reader.prepare([torch.from_numpy(one) for one in sounds])
    torch.testing.assert_close(found, wanted["input_values"], atol=1e-5, rtol=1e-5)
    assert mask is not None
    assert mask.equal(wanted["attention_mask"].long())
    assert reader.prepare([torch.from_numpy(tone(0.1))])[1] is None


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_wav_files(width: int, channels: int, tmp_path: Path) -> None:
    sounds = np.stack([tone(0.05), tone(0.05, pitch=100.0)][:channels], 1)
    found, rate = read_wav(save(tmp_path / "a.wav", sounds.flatten(), 12345, width, channels))
    assert rate == 12345
    torch.testing.assert_close(found, torch.from_numpy(sounds.mean(1)), atol=2.0 ** (1 - 8 * width), rtol=0)


def test_the_loudest_and_the_softest(tmp_path: Path) -> None:
    found, _ = read_wav(save(tmp_path / "a.wav", np.array([-1.0, 1.0, 0.0])))
    assert found.tolist() == [-1.0, 1.0 - 2.0**-15, 0.0]


def test_files_become_batches(tmp_path: Path) -> None:
    files = [save(tmp_path / "a.wav", tone(0.2)), save(tmp_path / "b.wav", tone(0.1))]
    features, _ = LogMel(chunk_length=1).batch(files)
    assert features.shape == (2, 80, 100)
    assert LogMel(chunk_length=1).read(files[0]).equal(features[0])
    with pytest.raises(DataError, match=r"a\.wav has 16,000 samples a second, but the model hears 8,000"):
        Waveform(sampling_rate=8000).batch(files)
    with pytest.raises(DataError, match=r"1\.5 seconds is longer than the model's 1; cut it"):
        LogMel(chunk_length=1).prepare([torch.zeros(24000)])


def test_what_is_no_sound(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.wav", tone(0.1)).read_bytes()
    floats = whole.replace(struct.pack("<H", 1) + struct.pack("<H", 1), struct.pack("<H", 3) + struct.pack("<H", 1), 1)
    broken = {
        "text.wav": (b"no sound", "no WAV file"),
        "empty.wav": (b"", "ends too early"),
        "head.wav": (whole[:44], "holds no sound"),
        "cut.wav": (whole[:30], "no WAV file"),
        "floats.wav": (floats, "no WAV file of whole numbers: unknown format"),
        "silent.wav": (whole[:24] + bytes(4) + whole[28:], "no WAV file that makes sense"),
    }
    for name, (content, message) in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_wav(tmp_path / name)
    with pytest.raises(DataError, match=r"absent\.wav can't be read: No such file"):
        read_wav(tmp_path / "absent.wav")
    (tmp_path / "long.wav").write_bytes(whole[:24] + struct.pack("<I", 1) + whole[28:])
    (tmp_path / "long.wav").write_bytes(whole[:24] + struct.pack("<II", 1, 2) + whole[32:] + bytes(9000))
    found, rate = read_wav(tmp_path / "long.wav")
    assert (len(found), rate) == (1600, 1)


def test_an_hour_is_enough(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="longer than 3,600 seconds"):
        read_wav(save(tmp_path / "long.wav", np.zeros(3601), rate=1))


def test_cut_files_give_what_is_there(tmp_path: Path) -> None:
    """Recorders that were stopped leave a header that promises more; whole samples are read."""
    samples = tone(0.1)
    whole = save(tmp_path / "whole.wav", samples).read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[:-301])
    found, _ = read_wav(tmp_path / "cut.wav")
    assert found.equal(read_wav(tmp_path / "whole.wav")[0][: len(samples) - 151])


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"feature_extractor_type": "ClapFeatureExtractor"}, "the feature extractor ClapFeatureExtractor; supported"),
        ({"dither": 0.5}, "dither = 0.5; only 0.0"),
        ({"padding_side": "left"}, "padding_side = 'left'; only 'right'"),
        ({"n_samples": 7}, "n_samples = 7; only 480000"),
        (
            {"hop_lenght": 7},
            r"a key 'hop_lenght' that WhisperFeatureExtractor does not know \(did you mean 'hop_length'",
        ),
        ({"n_fft": 10**9}, "n_fft = 1000000000 is not between"),
        ({"sampling_rate": 1}, "a sampling rate of 1 is not between"),
        ({"feature_size": "80"}, "should be a whole number"),
    ],
)
def test_what_is_not_understood(told: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        read_config({"feature_extractor_type": "WhisperFeatureExtractor", "sampling_rate": 16000} | told, "a file")


def test_newer_folders_say_it_beside_other_things(tmp_path: Path) -> None:
    told = {"feature_extractor_type": "WhisperFeatureExtractor", "sampling_rate": 8000}
    shared = {"feature_extractor": told, "processor_class": "WhisperProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(shared))
    assert SoundReader.find(tmp_path) == LogMel(sampling_rate=8000)
    assert ImageReader.find(tmp_path) is None
    (tmp_path / "processor_config.json").write_text("{")
    with pytest.raises(WeightsError, match="is not JSON"):
        SoundReader.find(tmp_path)


def test_only_what_is_about_sound_is_read(tmp_path: Path) -> None:
    assert SoundReader.find(tmp_path) is None
    ImageReader(resize=(3, 3)).save(tmp_path)
    assert SoundReader.find(tmp_path) is None


def test_older_files_hold_their_filters(tmp_path: Path) -> None:
    transformers.WhisperFeatureExtractor().save_pretrained(tmp_path)
    told = json.loads((tmp_path / "preprocessor_config.json").read_text())
    older = told | {"mel_filters": [[0.0]], "processor_class": "WhisperProcessor"}
    assert read_config(older, "a file") == LogMel()
