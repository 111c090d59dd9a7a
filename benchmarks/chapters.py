"""Chapters as documents: books of Project Gutenberg and articles of WikiText, each in a file of its own.

    python benchmarks/chapters.py [--letters] OUT FILE...

A book begins after "*** START OF", ends before "*** END OF" and is cut at its headings, WikiText at the titles of its
articles. (A copy of WikiText-103 that went through a CSV writer, with doubled quotes, is restored.) A part of fewer
than 2,000 characters, as of a table of contents, is joined to the next one. So `shortcut prepare text OUT` splits by
chapter. --letters writes the form of text8 (Mahoney 2006, "About the test data"): a to z and single spaces, digits
spelled out, as recipe `paper-text8` wants it.
"""

import argparse
import re
from pathlib import Path

LEAST = 2_000  # characters of a part
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
HEADING = re.compile(
    r"^(?:(?:CHAPTER|BOOK|LETTER|ADVENTURE|EPILOGUE|FIRST EPILOGUE|SECOND EPILOGUE)\b.{0,80}|[IVXLC]+\. [A-Z].{0,80}"
    r"| = [^=].* = )$",
    re.IGNORECASE | re.MULTILINE,
)


def text_of(path):
    text = path.read_text(encoding="utf-8-sig").replace("\r\n", "\n")
    if "csv" in path.name:
        text = re.sub(r'(?m)^"|"$', "", text.replace('""', '"'))
    begun = re.search(r"\*\*\* ?START OF.*\n", text)
    ended = re.search(r"\*\*\* ?END OF", text)
    return text[begun.end() if begun else 0 : ended.start() if ended else len(text)]


def parts(text):
    cuts = [0, *(found.start() for found in HEADING.finditer(text)), len(text)]
    begun = 0
    for cut in cuts[1:]:
        if cut - begun >= LEAST or cut == len(text):
            yield text[begun:cut]
            begun = cut


def letters(text):
    text = re.sub("[0-9]", lambda digit: f" {DIGITS[int(digit[0])]} ", text.lower())
    return re.sub("[^a-z]+", " ", text)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--letters", action="store_true")
    parser.add_argument("out", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    given = parser.parse_args()
    out = given.out
    out.mkdir(parents=True)
    for path in given.files:
        found = list(parts(text_of(path)))
        for number, part in enumerate(map(letters, found) if given.letters else found):
            (out / f"{path.name.partition('.')[0]}-{number:03}.txt").write_text(part, encoding="utf-8")
        print(f"{path.name}: {len(found)} parts, {sum(map(len, found)):,} characters")


if __name__ == "__main__":
    main()
