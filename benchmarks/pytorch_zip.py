"""A writer of PyTorch's zip files that can be told to lie, for tests and for fuzz.py."""

import hashlib
import struct
import zlib


def zipped(records, change=lambda *_: None, folder="archive"):
    """A zip file laid out as PyTorch lays it out. records: (name, bytes) pairs.

    change: called with (kind of header, name, its fields) for each header, and may change the fields.
    """
    body, directory = b"", b""
    for short, data in records:
        name = f"{folder}/{short}".encode()
        start = len(body)
        pad = -(start + 34 + len(name)) % 64
        local = {"flags": 0x808, "method": 0, "crc": 0, "packed": 0, "size": 0, "name": name, "before": b""}
        local["extra"] = b"FB" + struct.pack("<H", pad) + b"Z" * pad
        behind = {"crc": zlib.crc32(data), "packed": len(data), "size": len(data), "after": b""}
        central = {**local, **behind, "start": start, "extra": b"", "comment": b""}
        for kind, fields in (("local", local), ("behind", behind), ("central", central)):
            change(kind, short, fields)
        body += local["before"] + struct.pack(
            *("<4s5H3L2H", b"PK\x03\x04", 0, local["flags"], local["method"], 0, 0, local["crc"]),
            *(local["packed"], local["size"], len(local["name"]), len(local["extra"])),
        )
        body += local["name"] + local["extra"] + data
        if local["flags"] & 8:
            body += struct.pack("<4s3L", b"PK\x07\x08", behind["crc"], behind["packed"], behind["size"])
        body += behind["after"]
        directory += struct.pack(
            *("<4s6H3L5H2L", b"PK\x01\x02", 0, 0, central["flags"], central["method"], 0, 0, central["crc"]),
            *(central["packed"], central["size"], len(central["name"]), len(central["extra"])),
            *(len(central["comment"]), 0, 0, 0, central["start"]),
        )
        directory += central["name"] + central["extra"] + central["comment"]
    end = {"count": len(records), "size": len(directory), "start": len(body), "between": b"", "comment": 0}
    end |= {"disk": 0, "here": len(records)}
    change("end", "", end)
    tail = struct.pack(
        *(
            "<4s4H2LH",
            b"PK\x05\x06",
            end["disk"],
            0,
            end["here"],
            end["count"],
            end["size"],
            end["start"],
            end["comment"],
        )
    )
    return body + directory + end["between"] + tail


def sealed(content):
    """The same file with a comment that is its checksum."""
    body = content[:-2] + struct.pack("<H", 80)
    return body + b"shortcut sha256 " + hashlib.sha256(body).hexdigest().encode()
