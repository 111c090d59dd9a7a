"""Small piano pieces, composed by rule.

How a piece is composed, from the whole to the notes:

    form      a? a. b? a.    phrases of four bars: a theme, closed by a half cadence (?) or an authentic one (.)
    plan      I S V7 I       the harmony of a theme's bars: chords, or functions for which each theme picks a chord
    voicing   G2 B3 D4 F4    the four voices of a chord, led from those of the chord before
    figure    waltz          how the left hand plays a voicing
    motif     long short     a bar of melody, repeated and mirrored, fitted to the chords of its bar

Melody and chords are written as places in the scale (0 is the tonic, 7 the tonic an octave higher) and become MIDI
pitches at the end, so that major and minor share every rule. The rules are those of any harmony textbook.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations, product
from math import ceil
from random import Random
from typing import NamedTuple, TypeVar

Option = TypeVar("Option")


class Note(NamedTuple):
    """A note: start and length in beats, MIDI pitch, MIDI velocity 1 to 127."""

    start: float
    length: float
    pitch: int
    velocity: int


class Piece(NamedTuple):
    """A piano piece: its notes in order, its tempo in beats per minute, its meter in beats per bar."""

    notes: list[Note]
    tempo_bpm: int
    beats_per_bar: int

    @property
    def beats(self) -> float:
        """Beats until the last note ends."""
        return max(note.start + note.length for note in self.notes)


# Harmony


class Chord(NamedTuple):
    """A chord of thirds on a degree of the scale (0 to 6), the degree in its bass, and whether it has a seventh."""

    root: int
    bass: int
    seventh: bool = False

    @property
    def degrees(self) -> tuple[int, ...]:
        """Its degrees from the root upward."""
        return tuple((self.root + third) % 7 for third in (0, 2, 4, 6)[: 3 + self.seventh])

    @property
    def is_dominant(self) -> bool:
        """Whether it contains the leading tone, and so leads to the tonic."""
        return self.root in (4, 6)


class Key(NamedTuple):
    """The MIDI pitch of place 0, and the semitones of the scale above it, also under dominants, which may alter it."""

    tonic: int
    scale: tuple[int, ...]
    dominant_scale: tuple[int, ...]

    def pitch(self, place: int, chord: Chord) -> int:
        """The MIDI pitch of a place while `chord` sounds."""
        octave, degree = divmod(place, 7)
        return self.tonic + 12 * octave + (self.dominant_scale if chord.is_dominant else self.scale)[degree]


class Span(NamedTuple):
    """A chord, with its start and length in beats."""

    start: float
    length: float
    chord: Chord


class Figure(NamedTuple):
    """An accompaniment: the voices (0 is the bass) that sound at each step, repeated; the step is in beats."""

    step: float
    voices: tuple[tuple[int, ...], ...]


Voicing = tuple[int, ...]  # MIDI pitches of a chord's four voices, rising

MAJOR = (0, 2, 4, 5, 7, 9, 11)
NATURAL_MINOR = (0, 2, 3, 5, 7, 8, 10)
MELODIC_MINOR = (0, 2, 3, 5, 7, 9, 11)
KEYS = [Key(tonic, MAJOR, MAJOR) for tonic in (48, 50, 53, 55, 58)]
KEYS += [Key(tonic, NATURAL_MINOR, MELODIC_MINOR) for tonic in (50, 52, 55, 57)]

CHORDS = {  # named as in major; in minor, the same degrees of its scale
    "I": Chord(0, 0),
    "I6": Chord(0, 2),
    "ii": Chord(1, 1),
    "ii6": Chord(1, 3),
    "IV": Chord(3, 3),
    "V": Chord(4, 4),
    "V7": Chord(4, 4, seventh=True),
    "vi": Chord(5, 5),
    "vii6": Chord(6, 1),
}
FUNCTIONS = {"T": ("vi", "I6"), "S": ("IV", "ii", "ii6"), "D": ("V", "V7", "vii6")}
# By theme and cadence, four bars each. A theme's question and answer begin alike; a hyphen divides a bar.
PLANS: dict[str, list[dict[str, str]]] = {
    "a": [{"?": "I T S V", ".": "I T S-V7 I"}, {"?": "I S T V", ".": "I S V7 I"}, {"?": "I D I V", ".": "I D T-V7 I"}],
    "b": [{"?": "S I S V"}, {"?": "D I S V"}, {"?": "T D T V"}],
}
FORMS = ("a.", "a? a.", "a. b? a.", "a? a. b? a.")
BARS = 4  # in a phrase
TEMPOS_BPM = range(72, 148, 4)

BLOCK = Figure(4, ((0, 1, 2, 3),))
WALTZ = Figure(1, ((0,), (1, 2, 3), (1, 2, 3)))
MARCH = Figure(1, ((0,), (1, 2, 3)))
ALBERTI = Figure(0.5, ((0, 1), (3,), (2,), (3,)))
RISING = Figure(0.5, ((0,), (1,), (2,), (3,)))
RISING_AND_FALLING = Figure(0.5, ((0,), (1,), (2,), (3,), (2,), (1,)))
BROKEN_TENTHS = Figure(0.5, ((0,), (2, 3), (1,), (2, 3)))
FIGURES = {
    3: (BLOCK, WALTZ, RISING_AND_FALLING, BROKEN_TENTHS),
    4: (BLOCK, MARCH, ALBERTI, RISING, BROKEN_TENTHS),
}

# The registers, in MIDI pitches, do not overlap, so that no two parts ever strike the same key.
BASS = range(36, 52)
MIDDLE = range(52, 67)
MELODY_LOWEST = 67
MELODY_PLACES = 12
RESTING = (43, 55, 60, 64)  # the voicing that the first chord is led from


def _voicings(key: Key, chords: Sequence[Chord]) -> list[Voicing]:
    """A voicing for each chord, such that the voices move as little as possible."""
    led: list[Voicing] = [RESTING]
    for chord in chords:
        led.append(min((_effort(led[-1], voicing), voicing) for voicing in _choices(key, chord))[1])
    return led[1:]


def _choices(key: Key, chord: Chord) -> Iterator[Voicing]:
    """All voicings of a chord: the bass and three degrees above it, without the root if there is a seventh."""
    upper = chord.degrees[1:] if chord.seventh else chord.degrees
    voices = [(chord.bass, BASS), *((degree, MIDDLE) for degree in upper)]
    for bass, *others in product(*(_pitches(key, chord, degree, register) for degree, register in voices)):
        yield (bass, *sorted(others))


def _pitches(key: Key, chord: Chord, degree: int, register: range) -> list[int]:
    return [pitch for octave in range(-2, 2) if (pitch := key.pitch(7 * octave + degree, chord)) in register]


def _effort(before: Voicing, after: Voicing) -> int:
    """Semitones that the voices move, and twelve more for each parallel fifth or octave between two of them."""
    moves = list(zip(before, after, strict=True))
    parallels = sum(
        low != next_low and high - low == next_high - next_low and (high - low) % 12 in (0, 7)
        for (low, next_low), (high, next_high) in combinations(moves, 2)
    )
    return sum(abs(new - old) for old, new in moves) + 12 * parallels


def _accompany(figure: Figure, span: Span, voicing: Voicing) -> Iterator[tuple[float, float, int]]:
    """Start, length and pitch of each note of a chord played as a figure."""
    for step in range(ceil(span.length / figure.step)):
        offset = step * figure.step
        for voice in figure.voices[step % len(figure.voices)]:
            yield span.start + offset, min(figure.step, span.length - offset), voicing[voice]


# Melody


class Motif(NamedTuple):
    """A bar of melody: the lengths of its notes in beats, and their places relative to the first."""

    rhythm: tuple[float, ...]
    shape: tuple[int, ...]


class Theme(NamedTuple):
    """What all phrases with the same letter share."""

    plan: dict[str, str]  # by cadence
    chords: dict[str, Chord]  # by numeral and function
    figure: Figure
    motifs: tuple[Motif, ...]  # of the bars before the cadence
    contour: tuple[int, ...]  # the first places of these bars, counted from the lowest of the melody
    loudness: int  # of the accompaniment, as a MIDI velocity


class Phrase(NamedTuple):
    """Four bars: their theme, their chords, and the beats of rest after the melody's last note."""

    theme: Theme
    spans: list[Span]
    rest: float


class Tone(NamedTuple):
    """A note of the melody before it has a pitch: start and length in beats, place, and the chord under it."""

    start: float
    length: float
    place: int
    chord: Chord


RHYTHMS: dict[int, list[tuple[float, ...]]] = {  # by beats per bar; a note begins on beat 2, where chords may change
    3: [(1, 1, 1), (2, 1), (1, 0.5, 0.5, 1), (1.5, 0.5, 1), (1, 1, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5, 1)],
    4: [(1, 1, 1, 1), (2, 1, 1), (1, 0.5, 0.5, 1, 1), (1.5, 0.5, 1, 1), (1.5, 0.5, 1.5, 0.5), (0.5, 0.5, 0.5, 0.5, 2)],
}
SHAPES = (
    (0, 1, 2, 3, 4),  # scale
    (0, 1, 0, -1, 0),  # turn
    (0, 2, 1, 3, 2),  # thirds
    (0, 2, 4, 3, 2),  # triad
    (0, 0, 1, 1, 2),  # repeated notes
    (0, 1, 2, 1, 0),  # arch
)
CONTOURS = ((3, 4, 5), (4, 6, 5), (4, 5, 7), (6, 5, 4), (5, 7, 4), (4, 4, 6))
LOUDNESS = {"a": 52, "b": 64}
MELODY_LOUDER = 18
SWELL = 12  # how much louder a phrase gets, as a MIDI velocity
PEAK = 0.625  # where it is loudest, as a fraction of its length


def _sing(phrase: Phrase, places: range, beats_per_bar: int) -> list[Tone]:
    """The melody of a phrase: a motif in each bar, chord tones on accented beats, then the cadence."""
    tones: list[Tone] = []
    bar_start = phrase.spans[0].start
    for motif, height in zip(phrase.theme.motifs, phrase.theme.contour, strict=True):
        offset = 0.0
        first = _nearest(_chord_at(phrase, bar_start), places[height], places)
        for length, step in zip(motif.rhythm, motif.shape, strict=False):
            chord = _chord_at(phrase, bar_start + offset)
            place = min(max(first + step, places[0]), places[-1])
            accented = offset % 2 == 0
            tones.append(Tone(bar_start + offset, length, _nearest(chord, place, places) if accented else place, chord))
            offset += length
        bar_start += beats_per_bar
    return _smooth(_close(tones, phrase, places), places)


def _chord_at(phrase: Phrase, beat: float) -> Chord:
    return next(span.chord for span in reversed(phrase.spans) if span.start <= beat)


def _nearest(chord: Chord, place: int, places: range) -> int:
    """The chord tone nearest to a place; the lower one if there are two."""
    return min((p for p in places if p % 7 in chord.degrees), key=lambda p: (abs(p - place), p))


def _close(tones: Sequence[Tone], phrase: Phrase, places: range) -> list[Tone]:
    """Add the last note: the tonic, approached by step, or, in a half cadence, any tone of the dominant."""
    *body, penultimate = tones
    start, length, chord = phrase.spans[-1]
    if chord.is_dominant:
        place = _nearest(chord, penultimate.place, places)
    else:
        place = min((p for p in places[1:-1] if p % 7 == 0), key=lambda p: abs(p - penultimate.place))
        penultimate = penultimate._replace(place=place + (1 if penultimate.place > place else -1))
    return [*body, penultimate, Tone(start, length - phrase.rest, place, chord)]


def _smooth(tones: list[Tone], places: range) -> list[Tone]:
    """Every dissonance must be approached and left by step; one that is not becomes a chord tone."""
    while (wrong := next((i for i in range(len(tones)) if _is_loose(tones, i)), None)) is not None:
        tone = tones[wrong]
        tones[wrong] = tone._replace(place=_nearest(tone.chord, tone.place, places))
    return tones


def _is_loose(tones: Sequence[Tone], i: int) -> bool:
    """Whether a tone is a dissonance that is not approached and left by step."""
    neighbours = [tones[j].place for j in (i - 1, i + 1) if 0 <= j < len(tones)]
    dissonant = tones[i].place % 7 not in tones[i].chord.degrees
    return dissonant and any(abs(place - tones[i].place) != 1 for place in neighbours)


# The piece


def compose(seed: int, seconds: tuple[float, float] = (15, 30)) -> Piece:
    """Compose a piece, the same on every platform. seconds: the shortest and the longest that it may last."""
    rng = Random(seed)  # noqa: S311
    form, beats_per_bar, tempo_bpm = _pick(rng, _outlines(*seconds))
    key = _pick(rng, KEYS)
    themes = {letter: _theme(rng, letter, beats_per_bar) for letter in PLANS}
    phrases = _phrases(form.split(), themes, beats_per_bar)
    notes = [*_right_hand(phrases, key, beats_per_bar), *_left_hand(phrases, key, beats_per_bar)]
    return Piece(sorted(notes), tempo_bpm, beats_per_bar)


def _pick(rng: Random, options: Sequence[Option]) -> Option:
    """One of the options, by `random()`: the only method whose numbers are promised not to change in later Pythons."""
    return options[int(rng.random() * len(options))]


def _outlines(shortest_s: float, longest_s: float) -> list[tuple[str, int, int]]:
    """Form, beats per bar and tempo of all pieces of such a length: slow ones have few phrases, fast ones more."""
    outlines = [
        (form, beats_per_bar, tempo_bpm)
        for form, beats_per_bar, tempo_bpm in product(FORMS, FIGURES, TEMPOS_BPM)
        if shortest_s <= len(form.split()) * BARS * beats_per_bar * 60 / tempo_bpm <= longest_s
    ]
    assert outlines, f"no form lasts {shortest_s} to {longest_s} s"
    return outlines


def _theme(rng: Random, letter: str, beats_per_bar: int) -> Theme:
    """A theme: its basic idea, the idea repeated or inverted, and a second idea, in either order."""
    idea, other = (Motif(_pick(rng, RHYTHMS[beats_per_bar]), _pick(rng, SHAPES)) for _ in range(2))
    mirrored = idea._replace(shape=tuple(-step for step in idea.shape))
    return Theme(
        plan=_pick(rng, PLANS[letter]),
        chords=CHORDS | {function: CHORDS[_pick(rng, names)] for function, names in FUNCTIONS.items()},
        figure=_pick(rng, FIGURES[beats_per_bar]),
        motifs=_pick(rng, ((idea, idea, other), (idea, mirrored, other), (idea, other, idea), (idea, other, mirrored))),
        contour=_pick(rng, CONTOURS),
        loudness=LOUDNESS[letter],
    )


def _phrases(form: Sequence[str], themes: dict[str, Theme], beats_per_bar: int) -> list[Phrase]:
    """The phrases of a form in order; in all but the last, the melody ends with a beat of rest."""
    phrases = []
    for number, phrase in enumerate(form):
        theme, cadence = themes[phrase[0]], phrase[1]
        spans = _spans(theme, cadence, number * BARS * beats_per_bar, beats_per_bar)
        phrases.append(Phrase(theme, spans, rest=number < len(form) - 1))
    return phrases


def _spans(theme: Theme, cadence: str, start: float, beats_per_bar: int) -> list[Span]:
    """The chords of a phrase that begins at beat `start`."""
    spans = []
    for bar in theme.plan[cadence].split():
        names = bar.split("-")
        lengths = (beats_per_bar,) if len(names) == 1 else (2, beats_per_bar - 2)
        for name, length in zip(names, lengths, strict=True):
            spans.append(Span(start, length, theme.chords[name]))
            start += length
    return spans


def _right_hand(phrases: Sequence[Phrase], key: Key, beats_per_bar: int) -> Iterator[Note]:
    """The notes of the melody."""
    lowest = next(place for place in range(21) if key.pitch(place, CHORDS["I"]) >= MELODY_LOWEST)
    places = range(lowest, lowest + MELODY_PLACES)
    for phrase in phrases:
        for start, length, place, chord in _sing(phrase, places, beats_per_bar):
            velocity = _velocity(phrase.theme.loudness + MELODY_LOUDER, start, beats_per_bar)
            yield Note(start, length, key.pitch(place, chord), velocity)


def _left_hand(phrases: Sequence[Phrase], key: Key, beats_per_bar: int) -> Iterator[Note]:
    """The notes of the accompaniment: the theme's figure; the last chord and chords of one beat are struck at once."""
    voicings = iter(_voicings(key, [span.chord for phrase in phrases for span in phrase.spans]))
    last = phrases[-1].spans[-1]
    for theme, spans, _ in phrases:
        for span in spans:
            figure = BLOCK if span is last or span.length == 1 else theme.figure
            for start, length, pitch in _accompany(figure, span, next(voicings)):
                yield Note(start, length, pitch, _velocity(theme.loudness, start, beats_per_bar))


def _velocity(loudness: int, beat: float, beats_per_bar: int) -> int:
    """MIDI velocity: each phrase swells and fades, and beats are accented by their place in the bar."""
    share = beat / (BARS * beats_per_bar) % 1
    swell = share / PEAK if share < PEAK else (1 - share) / (1 - PEAK)
    accent = 8 if beat % beats_per_bar == 0 else 4 if beat % 1 == 0 else 0
    return loudness + round(SWELL * swell) + accent
