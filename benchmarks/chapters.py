"""Chapters as documents: books of Project Gutenberg and articles of WikiText, each in a file of its own.

    python benchmarks/chapters.py OUT FILE...

A book begins after "*** START OF", ends before "*** END OF" and is cut at its headings, WikiText at the titles of its
articles. (A copy of WikiText-103 that went through a CSV writer, with doubled quotes, is restored.) A part of fewer
than 2,000 characters, as of a table of contents, is joined to the next one. So `shortcut prepare text OUT` splits by
chapter.
"""

import re
import sys
from pathlib import Path

LEAST = 2_000  # characters of a part
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


def main():
    out, *files = map(Path, sys.argv[1:])
    out.mkdir(parents=True)
    for path in files:
        found = list(parts(text_of(path)))
        for number, part in enumerate(found):
            (out / f"{path.name.partition('.')[0]}-{number:03}.txt").write_text(part, encoding="utf-8")
        print(f"{path.name}: {len(found)} parts, {sum(map(len, found)):,} characters")


if __name__ == "__main__":
    main()
