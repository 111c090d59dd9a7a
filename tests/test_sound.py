"""Sound files are read to their real end, or rejected with the true reason; what else is odd is accounted for.

The oracle of every length is the number of samples that the test wrote, and mutagen for files that are whole.
"""

import gzip
import hashlib
import io
import itertools
import json
import os
import re
import struct
from functools import cache

import mutagen
import numpy as np
import pytest
import soundfile
from conftest import quiet
from hypothesis import given, settings
from hypothesis import strategies as st

from shortcut_cli import files
from shortcut_cli.config import reading
from shortcut_cli.data import sound, sound_mpeg, sound_stream, workers
from shortcut_cli.data.documents import Source
from shortcut_cli.data.sound import SoundReader
from shortcut_cli.data.sound_stream import Spliced
from shortcut_cli.errors import Rejected, UsageError
from shortcut_cli.stages import codec_evaluation
from shortcut_cli.stages.preparation import prepare
from shortcut_cli.tokenizers.audio import AudioOptions, AudioTokenizer

NEAR = 0.1  # seconds
FORMATS = ("WAV", "FLAC", "OGG", "OPUS", "MP3")
SUFFIX = {"WAV": "wav", "FLAC": "flac", "OGG": "ogg", "OPUS": "ogg", "MP3": "mp3"}


@cache
def tone(seconds, rate_hz=24_000, seed=0):
    """A glide with some noise, float32."""
    t = np.arange(round(seconds * rate_hz)) / rate_hz
    noise = np.random.default_rng(seed).normal(0, 0.02, len(t))
    return (0.4 * np.sin(2 * np.pi * (200 + 50 * t) * t) + noise).astype(np.float32)


@cache
def content(form, seconds=3.0, rate_hz=24_000, seed=0, **how):
    """The bytes of a sound file."""
    stream = io.BytesIO()
    kind = {"format": "OGG", "subtype": "OPUS"} if form == "OPUS" else {"format": form}
    soundfile.write(stream, tone(seconds, rate_hz, seed), rate_hz, **kind, **how)
    return stream.getvalue()


def read(path, **how):
    """The samples of a file and its reader."""
    reader = SoundReader(path, **how)
    return np.concatenate(list(reader)), reader


def reading_of(tmp_path, suffix, data, **how):
    """As `read`, of these bytes."""
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(data)
    return read(path, **how)


def reason(tmp_path, suffix, data, **how):
    """Why a file is rejected."""
    with pytest.raises(Rejected) as found:
        reading_of(tmp_path, suffix, data, **how)
    return str(found.value)


def id3(size):
    """An ID3v2.4 tag with this many zeros in it."""
    return b"ID3\x04\0\0" + bytes([0, 0, size >> 7, size & 0x7F]) + bytes(size)


def mp3_frames(data):
    """The frames of an MP3 file of constant format that begins with one, found by their headers; a plain loop."""
    found, at = [], 0
    while data[at : at + 1] == b"\xff":
        first = data[at + 1] >> 3 & 3 == 3
        kbps = (sound_mpeg.KBPS[first, 3])[data[at + 2] >> 4]
        hertz = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8000)}
        size = (144_000 if first else 72_000) * kbps // hertz[data[at + 1] >> 3 & 3][data[at + 2] >> 2 & 3]
        size += data[at + 2] >> 1 & 1
        found.append(data[at : at + size])
        at += size
    return found


def ogg_pages(data):
    """The pages of an Ogg file, found by their segment tables; a plain loop."""
    found, at = [], 0
    while at < len(data):
        size = 27 + data[at + 26] + sum(data[at + 27 : at + 27 + data[at + 26]])
        found.append(data[at : at + size])
        at += size
    return found


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("rate_hz", [8000, 24_000, 48_000])
def test_a_whole_file_has_the_length_that_was_written_and_that_mutagen_finds(tmp_path, form, rate_hz):
    samples, reader = reading_of(tmp_path, SUFFIX[form], content(form, 2.5, rate_hz))
    assert reader.seconds == pytest.approx(2.5, abs=NEAR if form == "MP3" else 1e-9)
    assert reader.seconds == pytest.approx(mutagen.File(tmp_path / f"a.{SUFFIX[form]}").info.length, abs=NEAR)
    assert len(samples) == pytest.approx(24_000 * reader.seconds, abs=1)
    assert reader.account == {}


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFF000, 0x80000000, 0xFFFFFFFF - 36])
@pytest.mark.parametrize("magic", [b"RIFF", b"RIFX"])
def test_a_wav_file_whose_size_was_never_written_is_read_to_its_end(tmp_path, magic, size):
    data = bytearray(content("WAV", endian="BIG" if magic == b"RIFX" else "LITTLE"))
    assert data[:4] == magic
    place = data.index(b"data") + 4
    data[4:8] = data[place : place + 4] = struct.pack(">I" if magic == b"RIFX" else "<I", size)
    samples, reader = reading_of(tmp_path, "wav", bytes(data))
    assert reader.seconds == 3.0
    assert np.abs(samples - tone(3.0)).max() < 2.0**-15


def rf64(size):
    """RF64 (EBU 3306) around the data of a WAV file. size: of the data, as its header gives it."""
    plain = content("WAV")
    form, samples = plain[plain.index(b"fmt ") : plain.index(b"data")], plain[plain.index(b"data") + 8 :]
    sizes = struct.pack("<QQQI", 0, size, 0, 0)
    return b"RF64\xff\xff\xff\xffWAVEds64" + struct.pack("<I", 28) + sizes + form + b"data\xff\xff\xff\xff" + samples


@pytest.mark.parametrize("size", [2 * 72_000, 0])
def test_rf64_with_and_without_a_size(tmp_path, size):
    samples, reader = reading_of(tmp_path, "wav", rf64(size))
    assert reader.seconds == 3.0
    assert np.abs(samples - tone(3.0)).max() < 2.0**-15


def test_rf64_that_is_cut_off_is_truncated(tmp_path):
    text = reason(tmp_path, "wav", rf64(2 * 72_000)[:-48_000])
    assert text == "is truncated: it promises 3.000 s, 2.000 s are there"


def chunk(name, body):
    return name + struct.pack("<I", len(body)) + body


def test_chunks_tags_and_zeros_behind_the_data_of_a_wav_file_are_no_damage(tmp_path):
    plain = content("WAV")
    id3 = b"ID3\x04\0\0\0\0\x7f\x7f" + bytes(0x7F << 7 | 0x7F)
    for rest in (chunk(b"LIST", b"INFO"), chunk(b"odd ", b"abc") + chunk(b"next", b""), id3, b"TAG" + bytes(125)):
        assert reading_of(tmp_path, "wav", plain + rest)[1].seconds == 3.0
    assert reading_of(tmp_path, "wav", plain + b"\0" * 100_000)[1].seconds == 3.0


def test_bytes_behind_the_data_of_a_wav_file_that_belong_to_nothing_are_damage(tmp_path):
    data = bytearray(content("WAV"))
    place = data.index(b"data") + 4
    data[place : place + 4] = struct.pack("<I", 48_000)
    text = reason(tmp_path, "wav", bytes(data))
    assert text == "is damaged: 96,000 bytes behind its sound belong to nothing; 1.000 s are there"
    _, reader = reading_of(tmp_path, "wav", bytes(data), damaged="keep")
    assert (reader.seconds, reader.account["files_damaged"]) == (1.0, 1)


@pytest.mark.parametrize("form", FORMATS)
def test_joined_files_are_read_to_the_last(tmp_path, form):
    parts = [content(form, seconds, rate_hz, seed=1) for seconds, rate_hz in ((2.0, 24_000), (3.0, 48_000))]
    samples, reader = reading_of(tmp_path, SUFFIX[form], b"".join(parts))
    assert reader.seconds == pytest.approx(5.0, abs=NEAR)
    assert len(samples) == pytest.approx(24_000 * reader.seconds, abs=2)
    # The second half is the sound of the second file, which may begin a little earlier or later.
    alone, _ = reading_of(tmp_path, SUFFIX[form], parts[1])
    products = np.correlate(samples[-30_000:-6000], alone[-24_000:-12_000])
    assert products.max() > 0.9 * np.square(alone[-24_000:-12_000]).sum()
    # And the last of them can be cut off.
    assert "is truncated" in reason(tmp_path, SUFFIX[form], b"".join(parts)[: -len(parts[1]) // 3])


def test_vorbis_and_opus_in_one_chain(tmp_path):
    data = content("OGG", 2.0, 44_100) + content("OPUS", 3.0, 48_000) + content("OGG", 1.0, 8000)
    samples, reader = reading_of(tmp_path, "ogg", data)
    assert reader.seconds == pytest.approx(6.0, abs=1e-3)
    assert len(samples) == pytest.approx(6 * 24_000, abs=24)


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
@pytest.mark.parametrize("rate_hz", [8000, 24_000, 44_100])
def test_an_mp3_without_or_with_a_false_header_is_read_to_its_last_frame(tmp_path, mode, rate_hz):
    data = content("MP3", 8.0, rate_hz, bitrate_mode=mode)
    header, *frames = mp3_frames(data)
    assert sum(map(len, frames)) + len(header) == len(data)
    place = next(header.index(name) for name in (b"Xing", b"Info") if name in header)
    lies = header[: place + 8] + struct.pack(">I", len(frames) // 4) + header[place + 12 :]
    vague = header[: place + 4] + struct.pack(">I", 0) + header[place + 8 :]
    for first in (b"", lies, vague):
        _, reader = reading_of(tmp_path, "mp3", first + b"".join(frames))
        # An encoder adds up to two frames, which only its header says are to be dropped.
        assert 8.0 - NEAR < reader.seconds < 8.0 + 2400 / rate_hz
        assert not reader.account.keys() - {"decoder_messages"}


def test_joined_mp3_files_of_two_versions_with_tags_between_them_are_read_to_the_last(tmp_path):
    data = content("MP3", 3.0, 44_100) + b"TAG".ljust(128, b"\0") + id3(5000) + content("MP3", 3.0, 22_050)
    _, reader = reading_of(tmp_path, "mp3", data)
    assert reader.seconds == pytest.approx(6.0, abs=NEAR)


@pytest.mark.parametrize("form", ["WAV", "AIFF"])
def test_an_id3_tag_before_a_form_is_passed_over(tmp_path, form):
    _, reader = reading_of(tmp_path, "wav", id3(5000) + content(form, 3.0))
    assert reader.seconds == pytest.approx(3.0, abs=1e-3)
    data = id3(5000) + content(form, 3.0)[:-48_000]
    assert reason(tmp_path, "wav", data) == "is truncated: it promises 3.000 s, 2.000 s are there"


def test_nist_sphere_files_are_read_and_their_size_checked(tmp_path):
    data = content("NIST", 3.0, 16_000)
    assert data[:7] == b"NIST_1A"
    _, reader = reading_of(tmp_path, "wav", data)
    assert reader.seconds == pytest.approx(3.0, abs=1e-3)
    found = reason(tmp_path, "wav", data[:-32_000])
    assert found == "is truncated: it promises 3.000 s, 2.000 s are there"
    packed = data.replace(b"-s3 pcm\n", b"-s26 pcm,embedded-shorten-v2.00\n")
    assert "compressed with Shorten" in reason(tmp_path, "wav", packed)
    assert "cut off" in reason(tmp_path, "wav", data[:40])
    for digits in (19, 400, 5000):
        endless = re.sub(rb"sample_count -i \d+", b"sample_count -i " + b"9" * digits, data)
        assert "not true" in reason(tmp_path, "wav", endless)


def test_bw64_is_rf64_under_another_name(tmp_path):
    data = content("RF64", 3.0)
    _, reader = reading_of(tmp_path, "wav", b"BW64" + data[4:])
    assert reader.seconds == pytest.approx(3.0, abs=1e-3)


def test_samples_in_wider_containers_than_libsndfile_expects_are_not_taken_for_more_samples(tmp_path):
    head = b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 16_000, 64_000, 4, 24)
    data = (
        b"RIFF"
        + struct.pack("<I", 36 + 64_000)
        + head
        + b"data"
        + struct.pack("<I", 64_000)
        + bytes(range(1, 65)) * 1000
    )
    found = reason(tmp_path, "wav", data)
    assert found == "contradicts itself: by its header 1.000 s are there, libsndfile decodes 1.333 s"


def test_a_file_that_macos_left_beside_an_mp3_is_not_taken_for_its_sound(tmp_path):
    (tmp_path / "._a.mp3").write_bytes(bytes.fromhex("0005160700020000") + bytes(4088))
    _, reader = reading_of(tmp_path, "mp3", content("MP3", 3.0))
    assert reader.seconds == pytest.approx(3.0, abs=NEAR)


def test_a_flac_file_inside_a_block_of_another_is_not_sound(tmp_path):
    data = content("FLAC", 3.0)
    inside = b"ABCD" + content("FLAC", 2.0)
    block = bytes([2]) + len(inside).to_bytes(3, "big") + inside  # of an application, RFC 9639, 8.4
    _, reader = reading_of(tmp_path, "flac", data[:42] + block + data[42:])
    assert data[4] < 0x80  # another block follows the first one
    assert reader.seconds == pytest.approx(3.0, abs=1e-3)


def test_what_comes_before_an_error_is_kept_whatever_the_size_of_the_blocks(tmp_path):
    data = bytearray(content("FLAC", 2.0))
    data[len(data) // 2] ^= 1
    samples, reader = reading_of(tmp_path, "flac", bytes(data), damaged="keep")
    assert 0.5 < reader.seconds < 1.5
    np.testing.assert_allclose(samples, tone(2.0)[: len(samples)], atol=1e-4)
    assert reader.account["seconds_missing"] == pytest.approx(2.0 - reader.seconds)


@pytest.mark.parametrize("form", ["MP3", "FLAC"])
def test_a_file_that_does_not_say_how_long_it_is_and_ends_in_mid_frame_is_truncated(tmp_path, form):
    data = b"".join(mp3_frames(content("MP3"))[1:]) if form == "MP3" else with_total(content("FLAC"), 0)
    text = reason(tmp_path, SUFFIX[form], data[:-50])
    found = re.fullmatch(
        r"is truncated: it ends in the middle of a frame(?:; it promises \S+ s,|;) (\S+) s are there", text
    )
    assert float(found[1]) == pytest.approx(3.0 - 50 / len(data), abs=0.2)
    _, reader = reading_of(tmp_path, SUFFIX[form], data[:-50], damaged="keep")
    assert reader.seconds == pytest.approx(float(found[1]), abs=NEAR)
    assert reader.account["files_damaged"] == 1


def test_mp3_in_wav(tmp_path):
    """Format tag 0x55: the frames are counted, not the bytes."""
    frames = b"".join(mp3_frames(content("MP3", 4.0, 44_100))[1:])
    form = struct.pack("<HHIIHHHHIHHH", 0x55, 1, 44_100, 0, 1, 0, 12, 1, 2, 417, 1, 1393)
    data = b"RIFF\0\0\0\0WAVE" + chunk(b"fmt ", form) + chunk(b"data", frames)
    assert reading_of(tmp_path, "wav", data)[1].seconds == pytest.approx(4.0, abs=NEAR)
    text = reason(tmp_path, "wav", data[: len(data) // 2])
    found = re.fullmatch(
        r"is truncated: it ends in the middle of a frame; it promises (\S+) s, (\S+) s are there", text
    )
    assert [float(number) for number in found.groups()] == pytest.approx([4.0, 2.0], abs=NEAR)


def test_vbri_headers_are_no_sound(tmp_path):
    """A VBRI header of Fraunhofer's encoder, 32 bytes behind a frame header."""
    header, *frames = mp3_frames(content("MP3", 4.0, 44_100))
    vbri = struct.pack(">4sHHHII", b"VBRI", 1, 0, 0, 0, len(frames))
    header = (frames[0][:4] + bytes(32) + vbri).ljust(len(frames[0]), b"\0")
    assert reading_of(tmp_path, "mp3", header + b"".join(frames))[1].seconds == pytest.approx(4.0, abs=NEAR)
    text = reason(tmp_path, "mp3", header + b"".join(frames[:80]))
    assert text.startswith("is truncated: it promises 4.0")


def test_tags_before_between_and_behind_mp3_frames_are_passed_over(tmp_path):
    frames = b"".join(mp3_frames(content("MP3", 4.0))[1:])
    body = (b"\xff\xf3\x84\xc4picture" * 30_000)[: 15 << 14]
    id3 = b"ID3\x03\0\0" + bytes([0, 15, 0, 0]) + body
    ape = b"APETAGEX" + struct.pack("<IIII", 2000, 64, 1, 0xA0000000) + bytes(8) + bytes(64 - 32 + 32)
    data = id3 + frames + b"TAG" + bytes(125) + id3 + frames + ape + b"TAG" + bytes(125)
    _, reader = reading_of(tmp_path, "mp3", data)
    assert reader.seconds == pytest.approx(8.0, abs=2 * NEAR)
    assert not reader.account.keys() - {"decoder_messages"}


def test_a_hole_in_an_mp3_is_damage(tmp_path):
    frames = mp3_frames(content("MP3", 8.0))[1:]
    size = sum(map(len, frames[100:200]))
    data = b"".join(frames[:100]) + b"\x55" * size + b"".join(frames[200:])
    text = reason(tmp_path, "mp3", data)
    assert text.startswith(f"is damaged: {size:,} bytes between its frames belong to none; it promises 8.")
    _, reader = reading_of(tmp_path, "mp3", data, damaged="keep")
    assert reader.account["seconds_missing"] == pytest.approx(100 * 576 / 24_000, rel=0.05)
    assert reader.seconds + reader.account["seconds_missing"] == pytest.approx(8.0, abs=NEAR)


def with_total(data, total):
    """A FLAC file with another number of samples in its first block."""
    fields = int.from_bytes(data[18:26], "big") >> 36 << 36 | total
    return data[:18] + fields.to_bytes(8, "big") + data[26:]


@pytest.mark.parametrize("total", [0, 1, 24_000])
def test_a_flac_file_with_no_or_too_small_a_number_of_samples_is_read_to_its_end(tmp_path, total):
    data = with_total(content("FLAC"), total)
    for end in (b"", b"TAG" + bytes(125)):
        samples, reader = reading_of(tmp_path, "flac", data + end)
        assert reader.seconds == 3.0
        assert np.abs(samples - tone(3.0)).max() < 2.0**-15


def test_a_flac_file_with_too_large_a_number_of_samples_is_truncated(tmp_path):
    text = reason(tmp_path, "flac", with_total(content("FLAC"), 240_000))
    assert text == "is truncated: it promises 10.000 s, 3.000 s are there"


def test_an_ogg_file_without_the_mark_of_its_end_is_truncated(tmp_path):
    pages = ogg_pages(content("OGG", 20.0))
    assert len(pages) > 6
    granule = struct.unpack("<q", pages[-3][6:14])[0]
    text = reason(tmp_path, "ogg", b"".join(pages[:-2]))
    assert text == f"is truncated: its last page is not marked as the end; {granule / 24_000:.3f} s are there"
    _, reader = reading_of(tmp_path, "ogg", b"".join(pages[:-2]), damaged="keep")
    assert reader.seconds == pytest.approx(granule / 24_000, abs=NEAR)
    assert reader.account["files_damaged"] == 1


@pytest.mark.parametrize("form", ["OGG", "OPUS"])
@pytest.mark.parametrize("gone", [True, False])
def test_an_ogg_file_that_lost_a_page_is_damaged(tmp_path, form, gone):
    """A page that is not there, or whose checksum is another."""
    pages = ogg_pages(content(form, 20.0))
    before, at = (struct.unpack("<q", pages[number][6:14])[0] for number in (3, 4))
    spoilt = pages[4][:300] + bytes([pages[4][300] ^ 1]) + pages[4][301:]
    data = b"".join(pages[:4] + [spoilt][gone:] + pages[5:])
    lost = (at - before) / (48_000 if form == "OPUS" else 24_000)
    assert lost > NEAR
    text = reason(tmp_path, "ogg", data)
    start = f"is damaged: 1 of {len(pages)} pages are missing or not true; it promises 20.000 s, "
    assert text.startswith(start)
    assert float(text[len(start) :].split()[0]) == pytest.approx(20.0 - lost, abs=NEAR)
    _, reader = reading_of(tmp_path, "ogg", data, damaged="keep")
    assert reader.account["seconds_missing"] == pytest.approx(lost, abs=NEAR)


def test_a_flac_file_with_a_frame_that_is_not_true_is_damaged(tmp_path):
    data = bytearray(content("FLAC", 20.0))
    data[len(data) // 2] ^= 1
    found = re.fullmatch(
        r"is damaged: 20\.000 s are there, (\S+) s can be decoded \(.*flac decoder.*\)",
        reason(tmp_path, "flac", bytes(data)),
    )
    assert 5 < float(found[1]) < 15
    _, reader = reading_of(tmp_path, "flac", bytes(data), damaged="keep")
    assert reader.seconds + reader.account["seconds_missing"] == pytest.approx(20.0)


@pytest.mark.parametrize("form", FORMATS)
def test_a_decoder_that_stops_early_without_an_error_is_noticed(tmp_path, monkeypatch, form):
    original, calls = soundfile.SoundFile.read, itertools.count()
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *a, **k: original(*a, **k)[: 65_536 * (next(calls) < 1)])
    text = reason(tmp_path, SUFFIX[form], content(form, 20.0))
    found = re.fullmatch(r"is damaged: (\S+) s are there, (\S+) s can be decoded", text)
    assert [float(number) for number in found.groups()] == pytest.approx([20.0, 65_536 / 24_000], abs=NEAR)


def test_the_packets_that_are_whole_in_a_page_that_is_not_are_kept(tmp_path):
    """The first page of sound is cut in its middle, which libsndfile takes for an empty file."""
    data = content("OGG", 3.0)
    pages = ogg_pages(data)
    half = b"".join(pages[:2]) + pages[2][: len(pages[2]) // 2]
    assert soundfile.info(io.BytesIO(half)).frames == 0
    assert "is truncated" in reason(tmp_path, "ogg", half)
    samples, reader = reading_of(tmp_path, "ogg", half, damaged="keep")
    assert reader.seconds > 0.3
    entire, _ = reading_of(tmp_path, "ogg", data)
    assert np.abs(samples - entire[: len(samples)])[:-2000].max() < 1e-6


def test_aiff_is_read_and_its_size_checked(tmp_path):
    data = content("AIFF")
    assert reading_of(tmp_path, "wav", data)[1].seconds == 3.0
    assert reason(tmp_path, "wav", data[:-48_000]) == "is truncated: it promises 3.000 s, 2.000 s are there"
    place = data.index(b"COMM") + 16  # of the exponent of the sampling rate, 16 bits, then its mantissa, 64 bits
    for exponent in (0x401F, 0x7FFF, 0xFFFF):
        changed = data[:place] + exponent.to_bytes(2, "big") + data[place + 2 :]
        assert "sampling rate of more than 32 bits" in reason(tmp_path, "wav", changed)


@settings(max_examples=60, deadline=None)
@given(form=st.sampled_from(FORMATS), share=st.floats(0, 1), seconds=st.sampled_from([0.5, 3.0]))
def test_wherever_a_file_is_cut_it_is_rejected_or_all_there(tmp_path_factory, form, share, seconds):
    tmp_path = tmp_path_factory.mktemp("cut")
    data = content(form, seconds)
    cut = data[: round(share * len(data))]
    whole = reading_of(tmp_path, SUFFIX[form], data)[1].seconds
    try:
        _, reader = reading_of(tmp_path, SUFFIX[form], cut)
        assert reader.seconds == pytest.approx(whole, abs=NEAR)
        assert reader.account == {}
    except Rejected as error:
        told = r"is truncated|is empty|is not \w+( audio)?:|without|first block|0 Hz|is damaged|no samples|libsndfile"
        assert re.search(told, str(error))  # noqa: PT017
    try:
        _, reader = reading_of(tmp_path, SUFFIX[form], cut, damaged="keep")
    except Rejected:
        return
    missing = reader.account.get("seconds_missing", 0)
    if form in ("WAV", "FLAC", "MP3"):  # which say at their beginning how long they are
        assert reader.seconds + missing == pytest.approx(whole, abs=NEAR)
    assert reader.seconds == pytest.approx(whole, abs=NEAR) or reader.account["files_damaged"] == 1


@pytest.mark.parametrize("form", FORMATS)
def test_the_size_of_the_blocks_makes_no_difference(tmp_path, monkeypatch, form):
    path = tmp_path / f"a.{SUFFIX[form]}"
    data = content(form, 1.0, 16_000)
    if form == "MP3":
        data = b"".join(mp3_frames(data)[1:])
    path.write_bytes(data + (data if form != "WAV" else b""))
    with open(path, "rb") as stream:
        expected = sound.streams(stream, path)
    for size in (80, 333, 1000):
        monkeypatch.setattr(sound_stream, "BLOCK_BYTES", size)
        monkeypatch.setattr(sound_mpeg, "BLOCK_BYTES", size)
        with open(path, "rb") as stream:
            assert sound.streams(stream, path) == expected


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_a_spliced_file_reads_as_its_parts_joined(data):
    whole = bytes(range(200))
    places = st.integers(0, 200)
    ranges = st.tuples(places, places).map(lambda both: (min(both), max(both)))
    parts = data.draw(st.lists(ranges | st.binary(max_size=9), max_size=6))
    joined = b"".join(part if isinstance(part, bytes) else whole[slice(*part)] for part in parts)
    plain, spliced = io.BytesIO(joined), Spliced(io.BytesIO(whole), parts)
    for _ in range(8):
        offset, count = data.draw(st.integers(0, 300)), data.draw(st.integers(0, 300))
        assert spliced.seek(offset) == plain.seek(offset)
        assert spliced.read(count) == plain.read(count)
        assert spliced.tell() == plain.tell()
    assert spliced.seek(0, io.SEEK_END) == len(joined)


HTML = b"<!DOCTYPE html><html><head><title>404</title></head></html>"


@pytest.mark.parametrize(
    ("suffix", "data", "expected"),
    [
        ("mp3", HTML, "is not MP3: it begins with '<!DOCTYPE'"),
        ("ogg", HTML, "is not Ogg: it begins with '<!DOCTYPE'"),
        ("flac", b"\0" * 5000, "is not FLAC: it begins with zeros"),
        ("mp3", b"\0\0\0\x1cftypM4A " + bytes(5000), "is not MP3: it begins with '....ftypM'"),
        ("wav", bytes(range(128, 228)), "is not WAV: it begins with the bytes 80 81 82 83 84 85 86 87"),
        ("mp3", b"", "is empty (0 bytes)"),
        ("mp3", b"\xff\xfb\x90\xc4" + bytes(1000), "is not MPEG audio: the first frame is not followed by another"),
        ("wav", b"RIFF\4\0\0\0WAVE", "is a WAV file without a chunk 'fmt'"),
        ("ogg", b"OggS" + bytes(100), "is an Ogg file without Vorbis, Opus, FLAC or Speex in it"),
        ("flac", b"fLaC" + bytes(100), "is a FLAC file whose first block is cut off or not true"),
    ],
)
def test_a_reason_names_what_is_wrong_with_the_file(tmp_path, suffix, data, expected):
    assert reason(tmp_path, suffix, data) == expected


def test_a_wav_file_without_rate_or_with_its_format_behind_its_data(tmp_path):
    data = bytearray(content("WAV"))
    place = data.index(b"fmt ")
    form = bytes(data[place : place + 24])
    behind = bytes(data[:place]) + bytes(data[place + 24 :]) + form
    assert reason(tmp_path, "wav", behind) == "is a WAV file whose chunk 'fmt' comes behind its data"
    data[place + 12 : place + 16] = bytes(4)
    assert reason(tmp_path, "wav", bytes(data)) == "is a WAV file with a sampling rate of 0 Hz"


def test_a_file_that_is_gone_or_may_not_be_read(tmp_path):
    with pytest.raises(Rejected, match="can't be read: No such file or directory"):
        read(tmp_path / "gone.wav")
    (tmp_path / "folder.wav").mkdir()
    with pytest.raises(Rejected, match="can't be read: Is a directory"):
        read(tmp_path / "folder.wav")


def test_a_truncated_file_in_gzip_is_rejected_for_the_same_reason(tmp_path):
    data = gzip.compress(content("WAV")[:-48_000])
    assert reason(tmp_path, "wav.gz", data) == "is truncated: it promises 3.000 s, 2.000 s are there"


def test_messages_of_libmpg123_are_counted_and_not_shown(tmp_path, capfd):
    frames = mp3_frames(content("MP3", 4.0))
    rng = np.random.default_rng(0)
    spoilt = [one[:4] + rng.bytes(len(one) - 4) if number % 9 == 5 else one for number, one in enumerate(frames)]
    _, reader = reading_of(tmp_path, "mp3", b"".join(spoilt))
    assert reader.account["decoder_messages"] >= 1
    assert reader.seconds == pytest.approx(4.0, abs=NEAR)
    assert capfd.readouterr().err == ""


def test_what_others_write_to_stderr_meanwhile_is_passed_on(tmp_path, capfd, monkeypatch):
    original = soundfile.SoundFile.read

    def chatty(self, *arguments, **options):
        os.write(2, b"a bystander\n")
        return original(self, *arguments, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", chatty)
    _, reader = reading_of(tmp_path, "mp3", content("MP3", 1.0))
    assert "decoder_messages" not in reader.account
    assert "a bystander" in capfd.readouterr().err


@pytest.mark.parametrize(("count", "rate_hz"), [(1, 96_000), (1, 192_000), (3, 192_000)])
def test_a_file_that_resamples_to_nothing_is_rejected_at_the_scan(tmp_path, count, rate_hz):
    soundfile.write(tmp_path / "a.wav", np.full(count, 0.5), rate_hz)
    plural = "s" * (count > 1)
    expected = f"has {count} sample{plural} at {rate_hz:,} Hz, which is none at 24,000 Hz"
    with pytest.raises(Rejected, match=re.escape(expected)):
        read(tmp_path / "a.wav")
    for weights in ("mini", "untrained:0"):
        tokenizer = AudioTokenizer(AudioOptions(name="audio", weights=weights))
        with pytest.raises(Rejected, match=re.escape(expected)):
            list(tokenizer.scan(source(tmp_path, tmp_path / "a.wav")))


@pytest.mark.parametrize("weights", ["mini", "untrained:0", "untrained_48khz:0"])
def test_the_shortest_sounds_can_be_encoded_by_every_codec_and_decoded(tmp_path, weights):
    tokenizer = AudioTokenizer(AudioOptions(name="audio", weights=weights))
    rate_hz = tokenizer.layout.rate_hz
    second = [tokenizer.layout.advance + extra for extra in (1, 2, 5)] if tokenizer.layout.segment else []
    for count in (1, 2, 7, 319, 320, 321, *second):
        soundfile.write(tmp_path / "a.wav", np.full(count, 0.5), rate_hz)
        given = source(tmp_path, tmp_path / "a.wav", name=str(count))
        (document,) = tokenizer.scan(given)
        (chunk,) = tokenizer.encode(given, lambda document: [("train", document.size)], 1)
        ids = np.concatenate(list(chunk.ids))
        assert document.size == len(ids) > 0
        assert document.units == {"second": count / rate_hz}
        assert tokenizer.decode(ids.tolist(), tmp_path / "b.wav")["second"] >= count / rate_hz


def test_samples_far_above_full_scale_are_noted(tmp_path):
    for peak, noted in ((1.9, False), (2.1, True), (9828, True)):
        rows = np.zeros((1000, 2), np.float32)
        rows[500] = [0.1, -peak]
        soundfile.write(tmp_path / "a.wav", rows, 24_000, subtype="FLOAT")
        _, reader = read(tmp_path / "a.wav")
        expected = {"files_above_full_scale": 1, "peak_max": pytest.approx(peak, rel=1e-6)}
        assert reader.account == (expected if noted else {})


def test_channels_that_cancel_are_noted(tmp_path):
    """The mean of a channel and -g times it is (1 - g) / 2 of it; with noise of its own it is not silent."""
    one, noise = tone(2.0), tone(2.0, seed=5) - tone(2.0)
    for gain, loudness, noted in ((1, 1, True), (0.95, 1, True), (0.9, 1, False), (-1, 1, False), (1, 1e-3, False)):
        for count in (2, 4):
            rows = np.tile(np.stack((one, -gain * one), 1) * loudness, count // 2)
            soundfile.write(tmp_path / "a.wav", rows, 24_000, subtype="FLOAT")
            # 20 log10((1 - g) / 2), against the mean of both channels: -31.8 dB for 0.95, -25.6 dB for 0.9.
            assert read(tmp_path / "a.wav")[1].account == ({"files_cancelled": 1} if noted else {}), (gain, count)
    soundfile.write(tmp_path / "a.wav", np.stack((one, -one + 4 * noise), 1), 24_000, subtype="FLOAT")
    assert read(tmp_path / "a.wav")[1].account == {}
    # As stereo nothing is lost.
    soundfile.write(tmp_path / "a.wav", np.stack((one, -one), 1), 48_000, subtype="FLOAT")
    assert read(tmp_path / "a.wav", rate_hz=48_000, channels=2)[1].account == {}


def source(tmp_path, path, name="a"):
    return Source(path, path.name, files.sha256(path), tmp_path / f"{name}.ids")


def odd(tmp_path):
    """A truncated file whose channels cancel, far above full scale."""
    one = 5 * tone(2.0)
    soundfile.write(tmp_path / "odd.wav", np.stack((one, -one), 1), 24_000, subtype="FLOAT")
    data = (tmp_path / "odd.wav").read_bytes()
    (tmp_path / "odd.wav").write_bytes(data[: -len(data) // 2])
    return tmp_path / "odd.wav"


def test_the_account_travels_with_the_staged_ids(tmp_path):
    tokenizer = AudioTokenizer(AudioOptions(name="audio", weights="untrained:0", damaged="keep"))
    path = odd(tmp_path)
    scanned, staged = source(tmp_path, path, "scanned"), source(tmp_path, path, "staged")
    (expected,) = tokenizer.scan(scanned)
    assert set(expected.account) == {
        "files_damaged", "seconds_missing", "files_above_full_scale", "peak_max", "files_cancelled"
    }  # fmt: skip
    assert expected.account["seconds_missing"] + expected.units["second"] == pytest.approx(2.0, abs=1e-3)
    tokenizer.stage([staged])
    assert staged.staged.exists()
    path.unlink()  # what is staged needs no file
    for again in (scanned, staged):
        assert list(tokenizer.scan(again)) == [expected]
        (chunk,) = tokenizer.encode(again, lambda document: [("train", document.size)], 1)
        assert chunk.document == expected


def test_a_file_that_changed_since_it_was_hashed_is_rejected(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(content("WAV", 1.0))
    for weights in ("mini", "untrained:0"):
        tokenizer = AudioTokenizer(AudioOptions(name="audio", weights=weights))
        path.write_bytes(content("WAV", 1.0))
        given = source(tmp_path, path)
        path.write_bytes(content("WAV", 1.0, seed=2))
        tokenizer.stage([given])
        with pytest.raises(Rejected, match="changed while it was being prepared"):
            list(tokenizer.scan(given))
        assert not given.staged.exists()
        path.write_bytes(content("WAV", 1.0))
        (document,) = tokenizer.scan(given)
        assert document.units == {"second": 1.0}
        given.staged.unlink()


@pytest.mark.parametrize("form", ["WAV", "FLAC", "MP3"])
def test_a_sound_that_is_half_rewritten_is_not_rejected_for_good(tmp_path, form):
    path = tmp_path / f"a.{form.lower()}"
    whole = content(form, 1.0)
    for after in (b"", whole[: len(whole) // 2], b"x" * len(whole)):
        path.write_bytes(after)
        with pytest.raises(Rejected, match="changed while it was being prepared") as raised:
            read(path, sha256=hashlib.sha256(whole).hexdigest())
        assert raised.value.passing
        with pytest.raises(Rejected) as raised:
            read(path, sha256=files.sha256(path))
        assert not raised.value.passing


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OPUS", "MP3", "AIFF"])
def test_a_name_that_is_no_utf_8_is_read_as_any_other(tmp_path, form):
    suffix = {"AIFF": "aif"}.get(form, form.lower())
    plain, odd = tmp_path / f"a.{suffix}", tmp_path / os.fsdecode(b"\xff\xfe\x1b." + suffix.encode())
    for path in (plain, odd):
        path.write_bytes(content(form, 1.0))
    assert np.array_equal(read(plain)[0], read(odd)[0])


def test_a_corpus_of_odd_files_is_prepared_rejected_and_accounted_for(tmp_path):
    folder = tmp_path / "sounds"
    folder.mkdir()
    for form in FORMATS:
        (folder / f"good-{form}.{SUFFIX[form]}").write_bytes(content(form, 1.0))
    one = tone(1.0)
    soundfile.write(folder / "cancelled.wav", np.stack((one, -one), 1), 24_000)
    soundfile.write(folder / "loud.wav", 9000 * one, 24_000, subtype="FLOAT")
    soundfile.write(folder / "none.wav", np.full(3, 0.5), 192_000)
    (folder / "page.mp3").write_bytes(HTML)
    (folder / "cut.wav").write_bytes(content("WAV")[:-48_000])
    for damaged, kept in (("reject", 0), ("keep", 1)):
        recipe = reading.read("audio-tiny", [f"tokenizer.damaged={damaged}"])
        manifest = prepare(recipe, [str(folder)], tmp_path / damaged, n_workers=1, max_bad="9", report=quiet)
        documents = [json.loads(line) for line in (tmp_path / damaged / "documents.jsonl").read_text().splitlines()]
        rejects = [json.loads(line) for line in (tmp_path / damaged / "rejects.jsonl").read_text().splitlines()]
        accounts = {one["source"]: one["account"] for one in documents if "account" in one}
        assert set(accounts) == {"cancelled.wav", "loud.wav", *(["cut.wav"] * kept)}
        assert manifest["account"]["peak_max"] == accounts["loud.wav"]["peak_max"] > 3000
        expected = {"files_cancelled": 1, "files_above_full_scale": 1}
        expected |= {"files_damaged": 1, "seconds_missing": 1.0} if kept else {}
        assert {name: manifest["account"].get(name) for name in expected} == expected
        assert {one["source"]: one["reason"] for one in rejects} == {
            "none.wav": "has 3 samples at 192,000 Hz, which is none at 24,000 Hz",
            "page.mp3": "is not MP3: it begins with '<!DOCTYPE'",
        } | ({} if kept else {"cut.wav": "is truncated: it promises 3.000 s, 2.000 s are there"})


def test_the_codec_is_trained_on_whole_files_and_told_about_the_others(tmp_path, monkeypatch):
    from shortcut_cli.codec import dataset

    def in_order(task, jobs, _, **__):
        for job in jobs:
            try:
                yield job, task(job)
            except Rejected as error:
                yield job, error

    monkeypatch.setattr(workers, "in_order", in_order)
    folder = tmp_path / "sounds"
    folder.mkdir()
    for number in range(4):
        soundfile.write(folder / f"{number}.wav", tone(1.0, seed=number), 24_000)
    soundfile.write(folder / "none.wav", np.full(1, 0.5), 96_000)
    soundfile.write(folder / "loud.wav", np.full(100, 7.0), 24_000, subtype="FLOAT")
    (folder / "cut.wav").write_bytes(content("WAV")[:-48_000])
    config, shown = reading.read_codec("codec-mini", []).data, []
    staged = dataset.stage([str(folder)], tmp_path / "data", config, n_workers=1, report=shown.append)
    rejects = [json.loads(line) for line in (tmp_path / "data" / "rejects.jsonl").read_text().splitlines()]
    assert {one["path"]: one["reason"] for one in rejects} == {
        "cut.wav": "is truncated: it promises 3.000 s, 2.000 s are there",
        "none.wav": "has 1 sample at 96,000 Hz, which is none at 24,000 Hz",
    }
    assert len(staged.clips) == 5
    assert json.loads((tmp_path / "data" / "clips.json").read_text())["account"] == {
        "files_above_full_scale": 1, "peak_max": 7.0
    }  # fmt: skip
    assert [event.text for event in shown if hasattr(event, "text")] == [
        "of the files read: 1 files far above full scale, 7 largest sample in them (full scale is 1)"
    ]
    # What is staged belongs to these files, whatever their names, and to this reader.
    (folder / "0.wav").rename(folder / "z.wav")
    assert dataset.stage([str(folder)], tmp_path / "data", config, n_workers=1, report=quiet) == staged
    monkeypatch.setattr(dataset, "READER_VERSION", 1)
    with pytest.raises(UsageError, match="its reader differ"):
        dataset.stage([str(folder)], tmp_path / "data", config, n_workers=1, report=quiet)


def test_a_file_that_changed_is_no_clip_of_a_codec(tmp_path):
    from shortcut_cli.codec import dataset

    (tmp_path / "a.wav").write_bytes(content("WAV", 1.0))
    with pytest.raises(Rejected, match="changed while"):
        dataset._read((tmp_path / "a.wav", "0" * 64, tmp_path / "a.s16"))
    assert not (tmp_path / "a.s16").exists()


def test_the_evaluation_of_a_codec_rejects_what_is_not_whole(tmp_path):
    (tmp_path / "cut.wav").write_bytes(content("WAV")[:-48_000])
    soundfile.write(tmp_path / "loud.wav", np.full(2000, 7.0), 24_000, subtype="FLOAT")
    result = codec_evaluation.evaluate("mini", [str(tmp_path)], None, report=quiet)
    assert result["rejects"] == [
        {"path": "cut.wav", "reason": "is truncated: it promises 3.000 s, 2.000 s are there"}
    ]  # fmt: skip
    assert result["account"] == {"files_above_full_scale": 1, "peak_max": 7.0}


def test_a_prompt_that_is_nothing_is_a_panel(tmp_path):
    """No traceback, whatever the file."""
    from shortcut_cli.inference.prompts import Prompt

    soundfile.write(tmp_path / "a.wav", np.full(3, 0.5), 192_000)
    tokenizer = AudioTokenizer(AudioOptions(name="audio", weights="mini"))
    with pytest.raises(UsageError, match="which is none at 24,000 Hz"):
        Prompt(tmp_path / "a.wav").ids(tokenizer)
