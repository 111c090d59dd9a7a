"""Sound and pictures inside a page, as data: URIs."""

import base64
import io
import struct
import zlib

import numpy as np
import numpy.typing as npt

MP3_RATES_HZ = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)  # that MPEG has
COMPRESSION = {1: 0.4, 2: 0.7}  # by channels, for libsndfile; noise at 24 and 48 kHz takes 45 and 106 kbit/s

Samples = npt.NDArray[np.float32]


def mp3(samples: Samples, rate_hz: int) -> str:
    """Sound, float32 (N,) or (N, 2), as MP3, which every browser plays; at another rate if MPEG lacks the given one."""
    import soundfile

    if rate_hz not in MP3_RATES_HZ:
        import soxr

        wanted = next((rate for rate in MP3_RATES_HZ if rate >= rate_hz), MP3_RATES_HZ[-1])
        samples, rate_hz = soxr.resample(samples, rate_hz, wanted), wanted
    stream, channels = io.BytesIO(), 1 if samples.ndim == 1 else samples.shape[1]
    kind = {"format": "MP3", "subtype": "MPEG_LAYER_III", "compression_level": COMPRESSION[channels]}
    with soundfile.SoundFile(stream, "w", rate_hz, channels, **kind) as sound:
        sound.write(np.clip(samples, -1, 1))
    return _uri("audio/mpeg", stream.getvalue())


def png(shades: npt.NDArray[np.uint8], *, most: int = 255) -> str:
    """A picture of shades 0 .. `most`, uint8 (rows, columns), the first row on top, in the colours of `palette`."""
    rows, columns = shades.shape
    scaled = (shades.astype(np.uint16) * 255 // most).astype(np.uint8)
    lines = np.zeros((rows, columns + 1), np.uint8)  # each line begins with its filter: none
    lines[:, 1:] = scaled
    header = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)  # 8 bits, indexed
    parts = (
        (b"IHDR", header),
        (b"PLTE", palette().tobytes()),
        (b"IDAT", zlib.compress(lines.tobytes(), 6)),
        (b"IEND", b""),
    )
    return _uri("image/png", b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, content) for name, content in parts))


def palette() -> npt.NDArray[np.uint8]:
    """256 colours (256, 3) from black to white, ever lighter, so that they print in grey: cubehelix, Green 2011.

    Its start is 0.5, with -1.5 rotations, hue 1, gamma 1.
    """
    light = np.linspace(0, 1, 256)
    angle = 2 * np.pi * (0.5 / 3 + 1 - 1.5 * light)
    strength = light * (1 - light) / 2
    turn = np.array([[-0.14861, 1.78277], [-0.29227, -0.90649], [1.97294, 0.0]])
    colours = light[:, None] + strength[:, None] * (np.stack([np.cos(angle), np.sin(angle)], 1) @ turn.T)
    return np.asarray(np.round(255 * colours.clip(0, 1)), np.uint8)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
