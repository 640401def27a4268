"""Sound for models: WAV files, and Whisper's log-mel features or plain normalised waveforms of them.

Shape letters: B batch, T samples, N frames, M mel bands, F frequencies.
"""

from __future__ import annotations

import wave
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from polyformer.data.preprocessor import find_preprocessor, save_preprocessor
from polyformer.errors import DataError, SpecError, suggest
from polyformer.spec import Record, field_types

SECONDS = 3600
"""How long a file may be that is read at once."""


class SoundReader(Record, abstract=True):
    """How sound is prepared for a model; its fields are the keys of `preprocessor_config.json` that matter.

    Class variables say the rest: `kind` is the reference's class, `main` the model's input, and `plain` holds further
    keys with the one value that is understood.
    """

    kind: ClassVar[str]
    main: ClassVar[str]
    plain: ClassVar[Mapping[str, Any]]

    sampling_rate: int = 16000

    def check(self) -> None:
        rate = self.sampling_rate
        self.require(1000 <= rate <= 400_000, f"a sampling rate of {rate} is not between 1,000 and 400,000")

    @staticmethod
    def find(folder: Path) -> SoundReader | None:
        """Return what lies in a checkpoint's folder; None where there is nothing or it is about something else.

        Raises:
            SpecError: preparation that is not understood in full.
            WeightsError: a damaged file, or a link out of the folder.
        """
        found = find_preprocessor(folder)
        return read_config(*found) if found is not None and "sampling_rate" in found[0] else None

    @classmethod
    def of_config(cls, data: Mapping[str, Any], where: str) -> Self:
        """Read the content of a `preprocessor_config.json`; raises `SpecError` for what is not understood in full."""
        fields = field_types(cls)
        own = {key: value for key, value in data.items() if key in fields}
        found = cls.from_data(own, where)
        told = {**cls.plain, **found.follows(), "feature_extractor_type": cls.kind}
        for key, value in data.items():
            if key in fields or key in ("processor_class", "mel_filters", "return_attention_mask"):
                continue
            if key not in told:
                raise SpecError(f"{where} has a key '{key}' that {cls.kind} does not know{suggest(key, fields)}")
            if value != told[key]:
                raise SpecError(f"{where} has {key} = {value!r}; only {told[key]!r} is supported")
        return found

    def follows(self) -> dict[str, Any]:
        """Return keys that a file may hold although they follow from others."""
        return {}

    def save(self, folder: Path) -> None:
        """Write `preprocessor_config.json` into a folder."""
        own = {key: getattr(self, key) for key in field_types(type(self))}
        save_preprocessor(folder, {**self.plain, **self.follows(), **own, "feature_extractor_type": self.kind})

    def read(self, file: str | Path) -> Tensor:
        """Read one file -> what the model takes of it, without the batch; raises `DataError` as `batch` does."""
        return self.batch([file])[0][0]

    def batch(self, files: Sequence[str | Path]) -> tuple[Tensor, Tensor | None]:
        """Read WAV files -> the model's input [B, ...], and which of its samples are real [B, T], if it asks for that.

        Raises:
            DataError: a file that can't be read as `read_wav` does, or is of another sampling rate than the model's.
        """
        sounds = []
        for file in files:
            samples, rate = read_wav(file)
            if rate != self.sampling_rate:
                told = f"{rate:,} samples a second, but the model hears {self.sampling_rate:,}"
                raise DataError(f"{file} has {told}; resample it first")
            sounds.append(samples)
        return self.prepare(sounds)

    def prepare(self, sounds: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Prepare waveforms [T] of values from -1 to 1; returns the same as `batch`."""
        raise NotImplementedError


class LogMel(SoundReader):
    """Whisper's features [B, M, N]: the logarithm of the energy in mel bands (Radford et al. 2023, section 2.2).

    Each sound is padded with silence to `chunk_length` seconds, or must be cut into pieces if it is longer. Windows of
    `n_fft` samples are `hop_length` apart; what is more than 80 dB below the loudest is raised to that.
    """

    kind: ClassVar[str] = "WhisperFeatureExtractor"
    main: ClassVar[str] = "input_features"
    plain: ClassVar[dict[str, Any]] = {"dither": 0.0, "padding_side": "right", "padding_value": 0.0}

    feature_size: int = 80
    hop_length: int = 160
    chunk_length: int = 30
    n_fft: int = 400

    def check(self) -> None:
        super().check()
        self.require(1 <= self.feature_size <= 1024, f"feature_size = {self.feature_size} is not between 1 and 1024")
        most = min(65536, self.sampling_rate)
        self.require(2 <= self.n_fft <= most, f"n_fft = {self.n_fft} is not between 2 and {most}")
        self.require(1 <= self.hop_length <= self.n_fft, f"hop_length = {self.hop_length} is not between 1 and n_fft")
        short = 1 <= self.chunk_length <= SECONDS
        self.require(short, f"chunk_length = {self.chunk_length} is not between 1 and {SECONDS}")

    def follows(self) -> dict[str, Any]:
        samples = self.chunk_length * self.sampling_rate
        return {"n_samples": samples, "nb_max_frames": samples // self.hop_length}

    def prepare(self, sounds: Sequence[Tensor]) -> tuple[Tensor, None]:
        room = self.chunk_length * self.sampling_rate
        longest = max(len(one) for one in sounds)
        if longest > room:
            seconds = f"{longest / self.sampling_rate:.1f} seconds"
            raise DataError(f"a sound of {seconds} is longer than the model's {self.chunk_length}; cut it into pieces")
        padded = torch.stack([torch.nn.functional.pad(one.float(), (0, room - len(one))) for one in sounds])
        window = torch.hann_window(self.n_fft)
        waves = torch.stft(padded, self.n_fft, self.hop_length, window=window, return_complex=True)
        energy_BFN = waves[..., :-1].abs().square()  # the last window is centred behind the end
        loudness_BMN = (mel_bands(self) @ energy_BFN).clamp(min=1e-10).log10()
        floor = loudness_BMN.amax((1, 2), keepdim=True) - 8.0
        return (torch.maximum(loudness_BMN, floor) + 4.0) / 4.0, None


class Waveform(SoundReader):
    """wav2vec 2.0's input [B, T]: the waveform, of zero mean and unit variance where `do_normalize` says so.

    Sounds are padded with zeros on the right; which samples are real is told where there is a difference.
    """

    kind: ClassVar[str] = "Wav2Vec2FeatureExtractor"
    main: ClassVar[str] = "input_values"
    plain: ClassVar[dict[str, Any]] = {"feature_size": 1, "padding_side": "right", "padding_value": 0.0}

    do_normalize: bool = True

    def prepare(self, sounds: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        lengths = torch.tensor([len(one) for one in sounds])
        if self.do_normalize:
            sounds = [(one - one.mean()) / torch.sqrt(one.var(unbiased=False) + 1e-7) for one in sounds]
        padded = torch.nn.utils.rnn.pad_sequence([one.float() for one in sounds], batch_first=True)
        real = torch.arange(padded.shape[1]) < lengths[:, None]
        return padded, None if bool(real.all()) else real.long()


KINDS: dict[str, type[SoundReader]] = {one.kind: one for one in (LogMel, Waveform)}


def read_config(data: Mapping[str, Any], where: str) -> SoundReader:
    """Read the content of a `preprocessor_config.json`; raises `SpecError` for what is not understood in full."""
    kind = str(data.get("feature_extractor_type"))
    if kind not in KINDS:
        raise SpecError(f"{where} is of the feature extractor {kind}; supported are {', '.join(KINDS)}")
    return KINDS[kind].of_config(data, where)


def mel_bands(spec: LogMel) -> Tensor:
    """Return how much of each frequency is in each band [M, F].

    Bands are triangles, evenly spaced up to 8 kHz on Slaney's mel scale, which is linear below 1 kHz and logarithmic
    above (Slaney 1998, Auditory Toolbox), and of equal area.
    """
    top, step = 8000.0, np.log(6.4) / 27.0
    mels = np.linspace(0.0, 15.0 + np.log(top / 1000.0) / step, spec.feature_size + 2)
    corners = np.where(mels < 15.0, mels * 200.0 / 3.0, 1000.0 * np.exp(step * (mels - 15.0)))
    frequencies = np.linspace(0.0, spec.sampling_rate // 2, 1 + spec.n_fft // 2)
    rising = (frequencies - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    falling = (corners[2:, None] - frequencies) / (corners[2:] - corners[1:-1])[:, None]
    triangles = np.clip(np.minimum(rising, falling), 0.0, None)
    return torch.from_numpy(triangles * (2.0 / (corners[2:] - corners[:-2]))[:, None]).float()


def read_wav(file: str | Path) -> tuple[Tensor, int]:
    """Read a WAV file of whole numbers of 8, 16, 24 or 32 bits -> samples [T] from -1 to 1, and how many a second.

    Several channels are averaged.

    Raises:
        DataError: no such file; no WAV of that kind, or a damaged one; no samples, or more than an hour of them.
    """
    try:
        with wave.open(str(file), "rb") as opened:
            channels, width, rate, count = opened.getparams()[:4]
            if min(channels, width, rate) < 1 or width > 4:
                raise DataError(f"{file} is no WAV file that makes sense")
            if count > SECONDS * rate:
                raise DataError(f"{file} is longer than {SECONDS:,} seconds; cut it into pieces")
            data = opened.readframes(count)
    except OSError as error:
        raise DataError(f"{file} can't be read: {error.strerror}") from None
    except (wave.Error, EOFError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} is no WAV file of whole numbers: {str(error) or 'it ends too early'}") from None
    if len(data) < channels * width:
        raise DataError(f"{file} holds no sound")
    data = data[: len(data) // (channels * width) * channels * width]
    if width == 1:
        whole = np.frombuffer(data, np.uint8).astype(np.float64) - 128.0
    else:  # the bytes of each number become the upper ones of four
        padded = np.zeros((len(data) // width, 4), np.uint8)
        padded[:, 4 - width :] = np.frombuffer(data, np.uint8).reshape(-1, width)
        whole = padded.view("<i4")[:, 0] / 256.0 ** (4 - width)
    samples = whole.reshape(-1, channels).mean(1) / 2.0 ** (8 * width - 1)
    return torch.from_numpy(samples).float(), rate
