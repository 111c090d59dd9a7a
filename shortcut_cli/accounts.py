"""Accounts: what is changed on the way from files to ids, counted per document. Every key, with its meaning.

A key names a thing in the plural and what happened to it, if it is a count (`notes_shortened`); an amount names its
unit (`beats_cut`). A key that ends in "_max" holds the largest amount of all documents, any other a sum. What did not
happen is left out.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """A key of accounts. label: on a screen, indented if it is about the things of the line above it."""

    unit: str
    label: str
    meaning: str = ""  # what the label does not say
    per_note: bool = False  # the mean over all notes says more than the sum


ODD = "the file was odd, and was read so"
VELOCITY = "steps of MIDI velocity, 1 to 127"

MIDI = {
    "notes_in": Entry("notes", "notes in the files"),
    "notes_out": Entry("notes", "notes in the ids"),
    "drum_notes_dropped": Entry("notes", "drum notes left out", "tokenizer.programs is off", per_note=True),
    "notes_reprogrammed": Entry(
        "notes", "notes given to another instrument", "tokenizer.programs is off: all but the piano's", per_note=True
    ),
    "onsets_moved": Entry(
        "notes", "notes that begin earlier or later", "rounded to tokenizer.beat_resolution", per_note=True
    ),
    "onset_moved_beats_max": Entry("beats", "  moved by at most, in beats"),
    "onset_moved_seconds_max": Entry("seconds", "  moved by at most, in seconds", "rounded tempos included"),
    "onset_moved_beats": Entry("beats", "  moved by, in beats", "sum of the distances", per_note=True),
    "notes_shortened": Entry("notes", "notes made shorter", "rounded, or cut to tokenizer.longest_note", per_note=True),
    "beats_cut": Entry("beats", "  shortened by, in beats", "sum over these notes", per_note=True),
    "notes_lengthened": Entry("notes", "notes made longer", "rounded", per_note=True),
    "beats_added": Entry("beats", "  lengthened by, in beats", "sum over these notes", per_note=True),
    "length_changed_beats_max": Entry("beats", "  length changed by at most, in beats", "shorter or longer"),
    "notes_sustained": Entry(
        "notes",
        "notes prolonged by the sustain pedal",
        'tokenizer.sustain = "durations", before rounding',
        per_note=True,
    ),
    "beats_sustained": Entry("beats", "  prolonged by, in beats", "sum over these notes", per_note=True),
    "velocities_changed": Entry(
        "notes", "notes made louder or softer", "rounded to tokenizer.velocities", per_note=True
    ),
    "velocity_changed_steps_max": Entry(VELOCITY, "  velocity changed by at most, of 127"),
    "velocity_changed_steps": Entry(VELOCITY, "  velocity changed by, of 127", "sum of the distances", per_note=True),
    "pedals_in": Entry("presses", "presses of the sustain pedal in the files"),
    "pedals_out": Entry("presses", "presses of the sustain pedal in the ids"),
    "pedals_applied": Entry("presses", "  turned into longer notes", 'tokenizer.sustain = "durations"'),
    "pedals_dropped": Entry(
        "presses", "  left out", "after the last note, of notes that are left out, or by tokenizer.sustain"
    ),
    "pedals_merged": Entry("presses", "  joined with another press", "they overlap, in the file or once rounded"),
    "pedals_shortened": Entry("presses", "  released earlier", "no later than tokenizer.longest_note after the end"),
    "pedal_moved_beats_max": Entry("beats", "  moved by at most, in beats", "pressed or released earlier or later"),
    "pedal_depths_dropped": Entry("events", "half-pedal positions left out", "values other than down and up"),
    "tempos_dropped": Entry(
        "events", "tempo changes left out", "no change once rounded, after the end, or tokenizer.tempos is off"
    ),
    "tempos_clipped": Entry("events", "tempos outside of the range", "tokenizer.tempo_range"),
    "tempos_rounded": Entry("events", "tempos rounded to one that has a token", "by more than 0.001 %"),
    "time_signatures_dropped": Entry(
        "events", "time signatures left out", "without a token, after the end, or tokenizer.time_signatures is off"
    ),
    "time_signatures_replaced": Entry("events", "time signatures replaced by one of equal length"),
    "time_signatures_moved": Entry("events", "time signatures moved to a barline"),
    "time_signatures_added": Entry("events", "time signatures added", "for a bar that the next one cuts short"),
    "seconds_cut": Entry("seconds", "seconds by which pieces became shorter"),
    "seconds_added": Entry("seconds", "seconds by which pieces became longer"),
    "pitch_bends_dropped": Entry("events", "pitch bends left out"),
    "control_changes_dropped": Entry("events", "controllers other than the pedal, left out"),
    "pressures_dropped": Entry("events", "aftertouch left out", "of keys or of whole channels"),
    "key_signatures_dropped": Entry("events", "key signatures left out"),
    "texts_dropped": Entry("events", "texts left out", "lyrics, markers and names of tracks"),
    "notes_closed": Entry("notes", "notes without an end that were ended", ODD),
    "notes_ended_by_controller": Entry("notes", "notes ended by All Notes Off and the like", ODD),
    "running_status_resumed": Entry("events", "events with a status from before a SysEx", ODD),
    "meta_events_dropped": Entry("events", "other meta events left out", "ports, sequence numbers, cues and the like"),
    "system_messages_dropped": Entry("events", "messages to one instrument left out", "system exclusive"),
    "system_messages_skipped": Entry("events", "messages that only a cable may carry", ODD),
    "meta_events_skipped": Entry("events", "meta events without a meaning", "such as a tempo of 0"),
    "data_bytes_clipped": Entry("bytes", "data bytes above 127, taken for 127", ODD),
    "bytes_skipped": Entry("bytes", "bytes that belong to no track", ODD),
    "tracks_beyond_header": Entry("tracks", "tracks beyond those in the header, read", ODD),
    "tracks_missing": Entry("tracks", "tracks in the header that are not there", "those that are there are whole"),
    "tracks_without_end": Entry("tracks", "tracks without an End of Track", ODD),
    "track_lengths_corrected": Entry("tracks", "tracks of another length than they declare", ODD),
    "track_ends_ignored": Entry("tracks", "tracks that go on after an End of Track", ODD),
}
AUDIO = {
    "files_damaged": Entry("files", "files kept although they are damaged", 'tokenizer.damaged = "keep"'),
    "seconds_missing": Entry("seconds", "  missing in them, in seconds"),
    "files_above_full_scale": Entry("files", "files far above full scale", "by more than 6 dB; kept as they are"),
    "peak_max": Entry("of full scale, which is 1", "  largest sample in them (full scale is 1)"),
    "files_cancelled": Entry("files", "files whose channels cancel out", "their mean is 30 dB below them, or more"),
    "decoder_messages": Entry("messages", "complaints of the MP3 decoder", "about faults in frames"),
}
TEXT = {
    "documents_normalized": Entry("documents", "documents changed by NFKC", 'tokenizer.normalization = "nfkc"'),
    "byte_order_marks_dropped": Entry("marks", "byte order marks left out", "at the start of a file"),
    "records_empty": Entry("records", "empty records left out", "of .jsonl files"),
}
DOMAINS = {"midi": MIDI, "audio": AUDIO, "text": TEXT}
ENTRIES = MIDI | AUDIO | TEXT
PLACES = {key: place for place, key in enumerate(ENTRIES)}


def rows(account: Mapping[str, float]) -> Iterator[tuple[str, float, float | None]]:
    """Label, amount and mean over all notes, if that says something, of every key of an account, in order.

    Keys that other versions wrote and this one does not know come last, under their own names.
    """
    notes = account.get("notes_out", 0)
    for key in sorted(account, key=lambda key: PLACES.get(key, len(PLACES))):
        entry = ENTRIES.get(key) or Entry("", key.replace("_", " "))
        yield entry.label, account[key], account[key] / notes if notes and entry.per_note else None
