"""Players and excerpts in Chromium: they play, their lengths are right, lines and values follow."""

import io

import mido
import numpy as np
import pytest
import soundfile
from test_browser import browser, context, opened  # noqa: F401 - fixtures
from test_report_attention import SHARES, written
from test_report_samples import made

from shortcut_cli.report import attention, page, samples

pytestmark = pytest.mark.browser
PLAY = """async (tracks) => {
  const audio = tracks.querySelector("audio"), head = tracks.querySelector(".playhead");
  if (audio.readyState < 1) await new Promise((done) => audio.addEventListener("loadedmetadata", done, { once: true }));
  audio.muted = true;  // which may play without a gesture
  await audio.play();
  while (audio.currentTime < 0.1) await new Promise((done) => setTimeout(done, 20));
  audio.pause();
  await new Promise((done) => setTimeout(done, 100));
  const line = head.getBoundingClientRect().left, box = tracks.querySelector(".over").getBoundingClientRect();
  return [audio.duration, audio.currentTime, (line - box.left) / box.width];
}"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages of a run's samples, and of attention of a text, by name."""
    root = tmp_path_factory.mktemp("samples")
    stream = io.BytesIO()
    soundfile.write(stream, np.sin(np.arange(3 * 24_000) / 9) / 3, 24_000, format="WAV")
    made(root / "samples", "a.wav", stream.getvalue(), prompt_tokens=10)
    file, track = mido.MidiFile(ticks_per_beat=480), mido.MidiTrack()
    for pitch in (60, 64, 67):
        track += [
            mido.Message("note_on", note=pitch, velocity=90, time=0),
            mido.Message("note_off", note=pitch, time=960),
        ]
    file.tracks.append(track)
    stream = io.BytesIO()
    file.save(file=stream)
    made(root / "samples", "b.mid", stream.getvalue())
    written(root, SHARES, {"texts": ["a ", "b", "\n", "<i>"]})
    found = {"samples": samples.sections(root), "attention": attention.sections(root)}
    for name, sections in found.items():
        (root / f"{name}.html").write_text(page.render(name, sections))
    return {name: root / f"{name}.html" for name in found}


def test_players_play_for_as_long_as_is_drawn(pages, opened):  # noqa: F811
    shown, found = opened(pages["samples"])
    players = shown.locator(".tracks").all()
    assert len(players) == 2
    for tracks, seconds in zip(players, (3.0, 3.5), strict=True):
        duration, now, line = tracks.evaluate(PLAY)
        assert duration == pytest.approx(seconds, abs=0.05)
        assert duration == pytest.approx(float(tracks.get_attribute("data-high")), abs=0.05)
        assert 0.1 <= now < seconds
        assert line == pytest.approx(now / seconds, abs=0.02)
        tracks.scroll_into_view_if_needed()
        box = tracks.locator(".over").bounding_box()
        shown.mouse.click(box["x"] + box["width"] / 2, box["y"] + 20)
        assert tracks.locator("audio").evaluate("audio => audio.currentTime") == pytest.approx(seconds / 2, abs=0.05)
    assert not found.errors
    assert "can't be" not in shown.locator("body").inner_text()
    assert [url for url in found.requests if not url.startswith(("file:", "data:", "blob:"))] == []


def test_values_follow_the_pointer(pages, opened):  # noqa: F811
    shown, found = opened(pages["attention"])
    shown.locator(".words.read span").nth(1).hover()
    assert shown.locator(".tip").inner_text() == "'b'\nlayer 2: 0.600\nlayer 1: 0.200\nembedding: 0.200"
    row = shown.locator(".draw.flat").first
    row.hover(position={"x": row.bounding_box()["width"] * 0.9, "y": 5})
    assert shown.locator(".tip").inner_text().splitlines() == [
        *("4 to 7 characters", "layer 2: +0.667", "layer 1: \u22120.333", "embedding: \u22120.333")
    ]
    assert not found.errors


@pytest.mark.parametrize("name", ["samples", "attention"])
@pytest.mark.parametrize("width", [360, 1600])
def test_nothing_is_wider_than_the_window(pages, opened, name, width):  # noqa: F811
    shown, _ = opened(pages[name], width=width)
    assert shown.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
